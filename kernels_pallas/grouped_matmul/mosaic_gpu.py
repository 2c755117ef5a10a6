"""The grouped product for Hopper GPUs, in Pallas Mosaic: `y_m = x_m W_e`, and its gradients.

Two kernels, of tiles of 128 by 128 numbers in bfloat16, summed in float32:

* `product`: rows times each group's matrix, for y, and for dX with the matrix read where it lies, turned round. As many
  blocks as there are multiprocessors share out a list of tiles that XLA makes on the device: each is of one group. Rows
  after the last group are one more group, whose tiles are zeros without a product.
* `matrices`: `dW_e = sum of x_m^T dY_m` over the rows of the group; a block has a tile of one matrix, so that every sum
  has one owner: no atomics, and the same bits every time.

A group begins at any row, while a copy of rows into shared memory as tensor cores take them begins at a multiple of 8
(`STEP`): so tiles of rows begin there. What other groups' rows there are in them is, in `product`, computed and not
written; in `matrices`, replaced by zeros in x and in dY, so that nothing of them counts, were it nan.

A block is two warpgroups that compute, of 64 rows of the tile each, and one that fetches ahead by the copy engine.
"""

import functools
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

from kernels_pallas import mosaic, platform
from kernels_pallas.grouped_matmul.tiles import COLUMNS, GROUPS, PART, ROWS, STEP, padded, tiles
from kernels_pallas.mosaic import Index, Span

HOPPER = 9  # major compute capability
MOST = 2**31  # what indices of 32 bits can count
COMPUTE_REGISTERS, FETCH_REGISTERS = 240, 24


@dataclass(frozen=True)
class Settings:
    """What changes the speed alone."""

    slots: int = 4  # parts in flight
    columns: int = COLUMNS  # of a tile, fewer where there are no more; a multiple of `PART`
    blocks: int = 132  # that share out the tiles of `product`: the multiprocessors of an H100 or H200


DEFAULTS = Settings()


# ----------------------------------------------------------------------------------------------------------- the call
def unsupported(x: Any, w: Any) -> str | None:
    """Why this cannot take a call on the device that is here, or None: of arrays, or of their shapes."""
    for name, value in (('x', x), ('w', w)):
        if value.dtype != jnp.bfloat16:
            return f'it takes bfloat16, {name} is {value.dtype.name}'
    if not x.shape[0] or not w.shape[0] or any(not size or size % PART for size in w.shape[1:]):
        return f'it takes rows, and matrices whose sides are multiples of {PART}; x is {x.shape}, w {w.shape}'
    if max(padded(x.shape[0]) + ROWS, w.shape[0] * w.shape[1] + ROWS) >= MOST:
        return f'indices of 32 bits cannot count the rows of x, {x.shape}, or of w, {w.shape}'
    capability = platform.compute_capability()
    if capability is None:
        return 'it needs an NVIDIA GPU'
    if capability[0] != HOPPER:
        return f'it is for GPUs of compute capability {HOPPER}.x, this one has {capability[0]}.{capability[1]}'
    return None


def variants() -> tuple[str, ...]:
    """The programs that a call runs, by the names of their cards."""
    return ('bfloat16',)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, interpret: Any = None, settings: Settings = DEFAULTS
) -> jax.Array:
    """Arguments and result as in `api.grouped_matmul`.

    Args:
      x, w: [M, D] and [E, D, F], bfloat16, D and F multiples of `PART`, any M of at least 1.
      group_sizes: int [E].
      interpret: parameters of Mosaic's interpreter, to run on a CPU; None compiles.
      settings: for trials.
    """
    return product(x, w, group_sizes, interpret, settings)


def _forward(x: jax.Array, w: jax.Array, group_sizes: jax.Array, interpret: Any, settings: Settings) -> Any:
    return grouped_matmul(x, w, group_sizes, interpret, settings), (x, w, group_sizes)


def _backward(interpret: Any, settings: Settings, residuals: Any, dy: jax.Array) -> Any:
    x, w, group_sizes = residuals
    dx = product(dy, w, group_sizes, interpret, settings, turned=True)
    return dx, matrices(x, dy, group_sizes, interpret, settings), None


grouped_matmul.defvjp(_forward, _backward)


def _pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, padded(x.shape[0]) - x.shape[0]), (0, 0)))


@dataclass(frozen=True)
class _Call:
    """How a kernel is launched."""

    columns: int  # of a tile
    slots: int
    dtype: Any
    interpret: Any


# ------------------------------------------------------------------------------------------------------------ kernels
def product(x, w, group_sizes, interpret=None, settings=DEFAULTS, turned=False):
    """Rows times each group's matrix, [M, F]; rows after the last group are zeros.

    Args:
      x: [M, D], bfloat16; [M, F] if `turned`, and the result is [M, D].
      w: [E, D, F], bfloat16.
      group_sizes: int [E].
      interpret, settings: as in `grouped_matmul`.
      turned: whether the matrices are meant turned round.
    """
    rows, groups = x.shape[0], w.shape[0]
    depth = w.shape[1]
    width = w.shape[1] if turned else w.shape[2]
    call = _Call(min(settings.columns, width), settings.slots, x.dtype, interpret)
    across, parts = -(-width // call.columns), x.shape[1] // PART
    arrays = {'x': _pad(x), 'w': w.reshape(-1, w.shape[2])}
    arrays |= tiles(group_sizes, padded(rows))
    most = arrays['group'].size
    blocks = min(settings.blocks, most * across)

    def body(ref):
        block = lax.axis_index('block')
        jobs = lax.div(ref.count[0] * across - block + (blocks - 1), blocks)

        def find(n):
            """The block's job number n: its columns' number, group, parts of its sums, first step, and its rows."""
            job = block + n * blocks
            tile = jnp.minimum(lax.div(job, across), most - 1)  # that of no job, too
            group = ref.group[tile]
            count = jnp.where(group < groups, parts, 0)
            return lax.rem(job, across), group, count, ref.step[tile], ref.begin[tile], ref.end[tile]

        def produce():
            def one_job(n, done):
                column, matrix, count, step, *_ = find(n)
                corner, first = Index(matrix) * depth, Index(step) * STEP

                def one(part, done):
                    slot = _free(ref, call, done)
                    inner = Span(Index(part) * PART, PART)
                    outer = Index(column) * call.columns
                    halves = [(Span(first + Index(g * PART, PART), PART), inner) for g in range(GROUPS)]
                    copies = [(ref.x, half, ref.x_.at[g]) for g, half in enumerate(halves)]
                    if turned:
                        box = Span(corner + outer, call.columns), inner
                    else:
                        box = Span(corner + inner.start, PART), Span(outer, call.columns)
                    mosaic.fetch([*copies, (ref.w, box, ref.w_)], slot, ref.arrived)
                    return done + 1

                return lax.fori_loop(0, count, one, done)

            lax.fori_loop(0, jobs, one_job, 0)

        def compute(group):
            def one_job(n, carry):
                done, (column, _, count, step, begin, end) = carry
                following = find(n + 1)  # on its way from memory meanwhile

                def multiply(sums, slot, part):
                    right = ref.w_.at[slot]
                    plgpu.wgmma(sums, ref.x_.at[group, slot], right.T if turned else right)

                value = _sum(ref, call, count, done, multiply)
                first = step * STEP + group * PART
                low, high = jnp.clip(begin - first, 0, PART), jnp.clip(end - first, 0, PART)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last job's results have left their places
                outer = Index(column) * call.columns

                @pl.when(high - low == PART)
                def _():
                    ref.y_.at[group][...] = value
                    plgpu.commit_smem()
                    rows = Span((Index(step) + Index(group) * (PART // STEP)) * STEP, PART)
                    mosaic.send(ref.y_, ref.y, (rows, Span(outer, call.columns)), group)

                @pl.when(high - low < PART)
                def _():
                    _send_some(ref, call, group, value, first, low, high, outer, width)

                return done + count, following

            lax.fori_loop(0, jobs, one_job, (0, find(0)))
            plgpu.wait_smem_to_gmem(0)

        _roles(compute, produce)

    left, right = (GROUPS, call.slots, PART, PART), (call.columns, PART) if turned else (PART, call.columns)
    scratch = {'x_': _matrix(call, *left), 'w_': _matrix(call, call.slots, *right)}
    scratch |= {'y_': _matrix(call, GROUPS, PART, call.columns)}
    scratch |= {'some_': plgpu.SMEM((GROUPS, call.columns // PART, PART, PART), call.dtype)}
    outputs = {'y': jax.ShapeDtypeStruct((padded(rows), width), call.dtype)}
    name = 'grouped_turned' if turned else 'grouped_product'
    (y,) = _launch(name, call, body, arrays, outputs, scratch, {'block': blocks})
    return y[:rows]


def _send_some(ref, call, group, value, first, low, high, outer, width):
    """Writes the rows [low, high) of a warpgroup's results, fewer than all, in powers of two."""
    for half in range(call.columns // PART):
        corner = (0, half * PART), (PART, (half + 1) * PART)
        mosaic.store(ref.some_.at[group, half], lax.slice(value, *corner))
    plgpu.commit_smem()
    count = high - low
    for size in (32, 16, 8, 4, 2, 1):
        start = low + (count & ~(2 * size - 1))  # the larger ones come first

        for half in range(call.columns // PART):

            @pl.when(((count & size) != 0) & (outer.value + half * PART < width))
            def _(size=size, start=start, half=half):
                box = Span(Index(first + start), size), Span(outer + Index(half * PART, PART), PART)
                mosaic.send(ref.some_.at[group, half, pl.ds(start, size)], ref.y, box)


def matrices(x, dy, group_sizes, interpret=None, settings=DEFAULTS):
    """The sum of x_m^T dY_m over each group's rows, [E, D, F].

    Args:
      x, dy: [M, D] and [M, F], bfloat16.
      group_sizes: int [E].
      interpret, settings: as in `grouped_matmul`.
    """
    depth, width, groups = x.shape[1], dy.shape[1], group_sizes.shape[0]
    call = _Call(min(settings.columns, width), settings.slots, x.dtype, interpret)
    down, across = -(-depth // ROWS), -(-width // call.columns)
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    arrays = {'x': _pad(x), 'dy': _pad(dy), 'begin': ends - sizes, 'end': ends}

    def body(ref):
        index, tile, column = lax.axis_index('matrix'), lax.axis_index('down'), lax.axis_index('across')
        begin, end = ref.begin[index], ref.end[index]
        step = lax.div(begin, STEP)
        count = jnp.where(end > begin, lax.div(end - step * STEP + (PART - 1), PART), 0)
        outer = Index(column) * call.columns

        def produce():
            def one(part, _):
                slot = _free(ref, call, part)
                rows = Span((Index(step) + Index(part) * (PART // STEP)) * STEP, PART)
                inner = Index(tile) * ROWS
                halves = [(rows, Span(inner + Index(g * PART, PART), PART)) for g in range(GROUPS)]
                copies = [(ref.x, half, ref.x_.at[g]) for g, half in enumerate(halves)]
                mosaic.fetch([*copies, (ref.dy, (rows, Span(outer, call.columns)), ref.dy_)], slot, ref.arrived)

            lax.fori_loop(0, count, one, None)

        def compute(group):
            def multiply(sums, slot, part):
                first = step * STEP + part * PART
                low, high = begin - first, end - first

                @pl.when((low > 0) | (high < PART))
                def _():
                    _blank(ref.x_.at[group, slot], low, high)

                    @pl.when(group == 0)
                    def _():
                        _blank(ref.dy_.at[slot], low, high)

                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ref.blank)
                    plgpu.barrier_wait(ref.blank)

                plgpu.wgmma(sums, ref.x_.at[group, slot].T, ref.dy_.at[slot])

            value = _sum(ref, call, count, 0, multiply)
            ref.w_.at[group][...] = value
            plgpu.commit_smem()
            start = tile * ROWS + group * PART

            @pl.when(start < depth)
            def _():
                first = Index(index) * depth + (Index(tile) * GROUPS + Index(group)) * PART
                mosaic.send(ref.w_, ref.w, (Span(first, PART), Span(outer, call.columns)), group)

            plgpu.wait_smem_to_gmem(0)

        _roles(compute, produce)

    scratch = {'x_': _matrix(call, GROUPS, call.slots, PART, PART)}
    scratch |= {'dy_': _matrix(call, call.slots, PART, call.columns), 'w_': _matrix(call, GROUPS, PART, call.columns)}
    scratch |= {'blank': plgpu.Barrier(num_arrivals=GROUPS)}
    outputs = {'w': jax.ShapeDtypeStruct((groups * depth, width), call.dtype)}
    grid = {'matrix': groups, 'down': down, 'across': across}
    (w,) = _launch('grouped_matrices', call, body, arrays, outputs, scratch, grid)
    return w.reshape(groups, depth, width)


# ------------------------------------------------------------------------------------------------------ what they share
def _sum(ref: Any, call: _Call, count: Any, done: Any, multiply: Callable[[Any, Any, Any], None]) -> Any:
    """A warpgroup's sums of `count` parts, rounded; the first is the block's part number `done`.

    A part's place is given back when the next part's product has begun: so one is always under way.
    """
    release = lambda n: plgpu.barrier_arrive(ref.used.at[lax.rem(n, call.slots)])

    def whole(sums):
        def one(part, _):
            slot = lax.rem(done + part, call.slots)
            plgpu.barrier_wait(ref.arrived.at[slot])
            multiply(sums, slot, part)
            plgpu.wgmma_wait(1)
            pl.when(part > 0)(lambda: release(done + part - 1))

        lax.fori_loop(0, count, one, None)
        value = sums[...].astype(call.dtype)
        pl.when(count > 0)(lambda: release(done + count - 1))
        return value

    return pl.run_scoped(whole, plgpu.ACC((PART, call.columns), jnp.float32))


def _free(ref: Any, call: _Call, n: Any) -> Any:
    """The slot of the block's part number n, when all who compute have done with what it held."""
    slot = lax.rem(n, call.slots)

    @pl.when(n >= call.slots)
    def _():
        plgpu.barrier_wait(ref.used.at[slot])

    return slot


def _blank(place: Any, low: Any, high: Any) -> None:
    """Puts zeros into the rows before `low` and from `high` on."""
    row = plgpu.broadcasted_iota(jnp.int32, place.shape, 0, layout=plgpu.Layout.WGMMA)
    value = plgpu.load(place, layout=plgpu.Layout.WGMMA)
    place[...] = jnp.where((row >= low) & (row < high), value, jnp.zeros((), value.dtype))


def _matrix(call, *shape):
    """Shared memory for matrices as tensor cores take them."""
    return plgpu.SMEM(shape, call.dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _roles(compute: Callable[[Any], None], produce: Callable[[], None]) -> None:
    group = lax.axis_index('group')

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
        compute(group)

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(FETCH_REGISTERS, action='decrease')
        produce()


def _launch(
    name: str,
    call: _Call,
    body: Callable[[Any], None],
    arrays: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
) -> Any:
    scratch = dict(scratch)
    scratch['arrived'] = plgpu.Barrier(num_arrivals=GROUPS + 1, num_barriers=call.slots)
    scratch['used'] = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=call.slots)
    names = (*arrays, *outputs, *scratch)
    assert len(set(names)) == len(names), names
    kernel = plgpu.kernel(
        lambda *refs: body(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        out_type=tuple(outputs.values()),
        scratch_types=tuple(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=GROUPS + 1,
        thread_name='group',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=mosaic_core.LoweringSemantics.Lane,
        ),
        kernel_name=name,
        **({} if call.interpret is None else {'interpret': call.interpret}),
    )
    return kernel(*arrays.values())
