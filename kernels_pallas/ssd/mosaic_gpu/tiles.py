"""What the kernels of `ssd` share: sizes and boxes, tiles in registers and in shared memory, launching."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import core as mosaic_core
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic import Box, Index, Span

CHUNK = 64  # tokens
PART = 64  # values of a unit, a slice of a head's
SLOTS = 2  # chunks, or units of a chunk, in flight
BF16 = jnp.bfloat16

WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


@dataclass(frozen=True)
class Call:
    """Sizes of a call, and the boxes of its flat arrays."""

    batch: int
    length: int  # of whole chunks
    heads: int
    width: int
    groups: int
    keys: int
    interpret: Any

    @property
    def chunks(self) -> int:
        return self.length // CHUNK

    @property
    def units(self) -> int:
        return self.heads * self.width // PART

    @property
    def in_group(self) -> int:
        return self.units // self.groups

    def head(self, unit: Any) -> Any:
        return lax.div(unit, self.width // PART)

    def tokens(self, row: Any, chunk: Any) -> Span:
        return Span(Index(row) * self.length + Index(chunk) * CHUNK, CHUNK)

    def values(self, row: Any, chunk: Any, unit: Any) -> Box:
        """Of arrays [B*T, H*P]."""
        return self.tokens(row, chunk), Span(Index(unit) * PART, PART)

    def by_group(self, row: Any, chunk: Any, group: Any) -> Box:
        """Of arrays [B*T, G*N]."""
        return self.tokens(row, chunk), Span(Index(group) * self.keys, self.keys)

    def vector(self, row: Any, chunk: Any, one: Any, count: int) -> tuple[Span]:
        """Of arrays [B*count*T], of so many heads or units."""
        return (Span((Index(row) * count + Index(one)) * self.length + Index(chunk) * CHUNK, CHUNK),)

    def state(self, row: Any, chunk: Any, unit: Any) -> Box:
        """Of arrays [B*chunks*H*P, N]."""
        return Span(((Index(row) * self.chunks + Index(chunk)) * self.units + Index(unit)) * PART, PART), slice(None)


# ------------------------------------------------------------------------------------------------------- in registers
def zero(total: Any) -> Any:
    """Zero, as no chunk's sum of log decays is above this. The compiler cannot know it: of what is the same in every
    turn of a loop it would keep the addresses, for which there are not registers enough."""
    return (total > 2.0**100).astype(jnp.int32)


def between(rows: Any, columns: Any, turned: bool = False) -> Any:
    """Decays [CHUNK, CHUNK] between tokens, of their sums; rows are the later ones or, turned round, the earlier."""
    exponent = broadcast(rows, 0, CHUNK) - broadcast(columns, 1, CHUNK)
    seen = iota(0) <= iota(1) if turned else iota(0) >= iota(1)
    return jnp.where(seen, jnp.exp2(-exponent if turned else exponent), 0.0)


def broadcast(vector: Any, axis: int, size: int) -> Any:
    """A vector of a tile's axis over the tile, whose other axis is of this size."""
    shape = (CHUNK, size) if axis == 0 else (size, CHUNK)
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (axis,)), WGMMA)


def iota(axis: int) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=WGMMA)


def wide(place: Any) -> Any:
    """A matrix in shared memory as float32."""
    return plgpu.load(place, layout=WGMMA).astype(jnp.float32)


def product(shape: tuple[int, int], left: Any, right: Any) -> Any:
    """A product of two matrices in shared memory, waited for, with all that are under way."""

    def whole(sums):
        plgpu.wgmma(sums, left, right)
        return plgpu.wgmma_accumulator_load(sums)

    return pl.run_scoped(whole, plgpu.ACC(shape, jnp.float32))


def from_registers(ref: Any, warpgroup: int, sums: Any, tile: Any, other: Any) -> None:
    """Begins `sums += tile other` of a tile in registers, which Mosaic's interpreter takes from shared memory alone."""
    left = getattr(ref, 'left_', None)
    if left is None:
        plgpu.wgmma(sums, tile, other)
    else:
        left.at[warpgroup][...] = tile
        plgpu.commit_smem()
        plgpu.wgmma(sums, left.at[warpgroup], other)


# ---------------------------------------------------------------------------------------------------------- launching
def matrix(*shape):
    """Shared memory for matrices as tensor cores take them."""
    return plgpu.SMEM(shape, BF16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def vectors() -> Any:
    """Shared memory for a number a token."""
    return plgpu.SMEM((SLOTS, CHUNK), jnp.float32)


def launch(
    name: str,
    call: Call,
    body: Callable[[Any], None],
    arrays: Mapping[str, jax.Array],
    outputs: Mapping[str, Any],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    threads: int = 1,
) -> dict[str, jax.Array]:
    """Runs a body of so many warpgroups in every block of a grid, with all refs by name; the outputs by name."""
    if call.interpret is not None:
        scratch = {**scratch, 'left_': matrix(2, CHUNK, CHUNK)}
    names = (*arrays, *outputs, *scratch)
    assert len(set(names)) == len(names), names
    kernel = plgpu.kernel(
        lambda *refs: body(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        out_type=tuple(outputs.values()),
        scratch_types=tuple(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name='group',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=mosaic_core.LoweringSemantics.Lane,
        ),
        kernel_name=name,
        **({} if call.interpret is None else {'interpret': call.interpret}),
    )
    return dict(zip(outputs, kernel(*arrays.values()), strict=True))
