"""Tile sizes of kernels, timed beside those in use, forward and backward."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import cases, platform
from kernels_pallas.attention import cases as attention
from kernels_pallas.attention import tokamax as flash
from kernels_pallas.grouped_matmul import cases as grouped
from kernels_pallas.grouped_matmul import mosaic_gpu as ragged
from kernels_pallas.selective_scan import mosaic_gpu
from kernels_pallas.selective_scan.cases import draw
from kernels_pallas.selective_scan.mosaic_gpu import tuning

FORWARD = [(16, 2), (32, 1), (32, 4), (64, 2)]  # of the scan: tile, steps written out
BACKWARD = [(8, 4), (16, 2), (16, 8), (32, 4)]  # tile, steps in registers at once
RAGGED = [{'slots': 2}, {'slots': 3}, {'slots': 3, 'columns': 192}, {'slots': 5}, {'blocks': 1 << 20}]  # a block a tile
FLASH = [(64, 64, 2), (64, 64, 4), (128, 128, 2), (64, 256, 2)]  # queries, keys, stages


class Candidate(NamedTuple):
    """A function to time, of `arrays`; `passes` are `forward` and `both`."""

    name: str
    function: Callable[[Any], jax.Array]
    arrays: Any
    passes: tuple[str, ...] = ('forward', 'both')


def scans() -> Iterator[Candidate]:
    arrays = draw((8, 4096, 4096, 16), jnp.bfloat16, True, True, True, False, False)  # B, T, D, N
    current = tuning.settings(tuning.generation(platform.compute_capability()), 16, 2, False)
    ahead = [replace(current, forward_tile=tile, unroll=unroll) for tile, unroll in FORWARD]
    back = [replace(current, backward_tile=tile, stretch=stretch) for tile, stretch in BACKWARD]
    for settings in (current, *ahead, *back):
        run = lambda arrays, settings=settings: mosaic_gpu.scan(
            **arrays, dt_softplus=True, splits=1, settings=settings
        )[0]
        yield Candidate(str(settings), run, arrays, ('forward',) if settings in ahead else ('forward', 'both'))


def products() -> Iterator[Candidate]:
    rows, groups, width, columns = 65536, 8, 768, 832
    arrays = grouped.draw(rows, groups, width, columns)
    sizes = jnp.asarray(grouped.sizes(rows, groups, 0.01))
    for changed in ({}, *RAGGED):
        settings = ragged.Settings(**changed)
        run = lambda arrays, settings=settings: ragged.grouped_matmul(arrays['x'], arrays['w'], sizes, None, settings)
        yield Candidate(f'grouped_matmul {settings}', run, arrays)


def attentions() -> Iterator[Candidate]:
    for batch, length, heads, width in ((16, 2048, (12, 3), 64), (4, 4096, (16, 4), 128)):
        arrays = attention.draw(batch, length, heads, width)
        ids = np.tile(1 + np.arange(length, dtype=np.int32) // 700, (batch, 1))
        for changed in (None, *FLASH):
            tiles = flash.TILES if changed is None else dict(zip(flash.TILES, changed))

            def run(arrays, tiles=tiles, ids=ids, width=width):
                with mock.patch.dict(flash.TILES, tiles):
                    return attention.run(ids, width, 'tokamax', arrays)[0]

            yield Candidate(
                f'attention of width {width} {tiles}', run, arrays, ('forward',) if changed else ('forward', 'both')
            )


KERNELS: dict[str, Callable[[], Iterator[Candidate]]] = {
    'grouped_matmul': products, 'attention': attentions, 'selective_scan': scans,
}  # fmt: skip


def measure(kernel: str, say: Callable[[dict[str, Any]], None], compiled: Callable[[float], None]) -> None:
    """Says the milliseconds of every candidate; one that does not compile is named with its error.

    Args:
      kernel: of `KERNELS`.
      say: takes what is found.
      compiled: called between compiling and timing.
    """
    ready = []
    for one in KERNELS[kernel]():
        for name in one.passes:
            run, args = (one.function, (one.arrays,)) if name == 'forward' else both(one.function, one.arrays)
            try:
                ready.append((one.name, name, jax.jit(run).lower(*args).compile(), args))
            except Exception as error:  # of any kind: compiler, memory
                say({'tiles': one.name, name: None, 'refused': f'{type(error).__name__}: {str(error).strip()}'[:300]})
    compiled(0.0)
    for tiles, name, run, args in ready:
        try:
            say({'tiles': tiles, name: float(f'{cases.queued(run, *args):.4g}')})
        except Exception as error:  # of any kind: driver, memory
            say({'tiles': tiles, name: None, 'refused': f'{type(error).__name__}: {str(error).strip()}'[:300]})


def both(function: Callable[[Any], jax.Array], arrays: Any) -> tuple[Callable, tuple[Any, ...]]:
    """The forward and backward pass of a function, and its arguments."""
    y = jax.eval_shape(function, arrays)
    dy = jax.random.normal(jax.random.key(1), y.shape).astype(y.dtype)

    def run(arrays, dy):
        y, pull = jax.vjp(function, arrays)
        return y, pull(dy)

    return run, (arrays, dy)
