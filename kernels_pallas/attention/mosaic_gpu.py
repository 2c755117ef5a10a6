"""Attention's gradient for Hopper GPUs, in Pallas Mosaic: blocks that no document of theirs reaches are not visited.

With `P = exp(S - logsumexp)` of a tile computed anew and `delta = sum(dO * O)`, two kernels make what they need:

* dq: `dS = P * (dO V^T - delta)`, `dQ += dS K`. A block of queries goes through the keys from its first query's first
  key to its own end.
* dk and dv: the same tile lying down, keys by queries, so that weights and dS leave the registers for no product:
  `dV += P^T dO`, `dK += dS^T Q`. A block of keys goes through the queries from the last that sees its last key to its
  own, of all query heads that share its head one after the other, whose sum stays in registers.

Seven products a tile in place of five, but every sum has one owner: no atomics, and the same bits every time. The
method is FlashAttention's (Dao et al., 2022; Dao, 2023). Documents are given by the first key of each query, which
never falls from one query to the next.

A block is two warpgroups that compute, of a tile's rows each, and one that fetches ahead by the copy engine.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import core as mosaic_core
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic
from kernels_pallas.mosaic import Index, Span

TILE = 64  # rows of a warpgroup's products, and what they meet at a time
GROUPS = 2  # warpgroups that compute
BLOCK = GROUPS * TILE  # lengths are multiples of it
SLOTS = 3  # tiles in flight
WIDTHS = (64, 128)
LOG2E = math.log2(math.e)
COMPUTE_REGISTERS, FETCH_REGISTERS = 240, 24

BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


# ------------------------------------------------------------------------------------------------------ what is visited
def last_queries(start: Any) -> Any:
    """One past the last query [B, T] that sees each key: where the next document, or padding, begins.

    Args:
      start: int [B, T], the first key that each query sees.
    """
    length = start.shape[1]
    begins = jnp.where(start == jnp.arange(length), jnp.arange(length), length)
    following = lax.cummin(begins, axis=1, reverse=True)
    return jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=length).astype(jnp.int32)


def visited(start: np.ndarray, block: int = BLOCK, tile: int = TILE) -> tuple[int, int]:
    """Tiles [block, tile] that the kernels of dq, and of dk and dv, visit for a head of these rows, by their bounds.

    Args:
      start: as in `last_queries`, of padded length.
      block, tile: rows of a block, and of a turn of its loop.
    """
    start, end = np.asarray(start), np.asarray(last_queries(jnp.asarray(start)))
    firsts = np.arange(0, start.shape[1], block)
    queries = (firsts + block) // tile - start[:, firsts] // tile
    keys = -(-end[:, firsts + block - 1] // tile) - firsts // tile
    return int(queries.sum()), int(keys.sum())


def order(end: jax.Array | None, batch: int, length: int, kv_heads: int) -> jax.Array:
    """The blocks of keys [batch * kv_heads * length / BLOCK, 3] as they begin: row, head, block; the longest first.

    They come by the number of their tiles, in classes of a power of two. Within a class they stay as they lie, so that
    blocks that run at a time are neighbours, which read the same queries.

    Args:
      end: int32 [batch, length] or flat, of `last_queries`; None for the length.
      batch, length, kv_heads: of the keys.
    """
    blocks = length // BLOCK
    last = jnp.full((batch, blocks), length) if end is None else end.reshape(batch, blocks, BLOCK)[..., -1]
    tiles = -(-last // TILE) - jnp.arange(blocks) * GROUPS
    classes = jnp.broadcast_to(lax.clz(tiles.astype(jnp.int32))[:, None], (batch, kv_heads, blocks))
    places = jnp.argsort(classes.reshape(-1), stable=True)
    return jnp.stack(jnp.unravel_index(places, classes.shape), axis=1).astype(jnp.int32)


# ------------------------------------------------------------------------------------------------------------ the call
@dataclass(frozen=True)
class _Call:
    """Sizes of a call, and how a kernel is launched."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    scale: float
    packed: bool
    dtype: Any
    interpret: Any

    @property
    def shared(self) -> int:
        return self.heads // self.kv_heads


def backward(q, k, v, out, dout, logsumexp, start, scale, interpret=None):
    """Gradients of q, k and v.

    Args:
      q, out, dout: [B, T, H, d], bfloat16, T a multiple of `BLOCK`, d of `WIDTHS`.
      k, v: [B, T, K, d], bfloat16.
      logsumexp: float32 [B, H, T], of the scaled scores of each query, finite.
      start: int32 [B, T], the first key that each query sees, itself at the latest, not falling; None for the first.
      scale: of the scores.
      interpret: parameters of Mosaic's interpreter, to run on a CPU; None compiles.
    """
    batch, length, heads, width = q.shape
    assert length % BLOCK == 0 and width in WIDTHS, q.shape
    call = _Call(batch, length, heads, k.shape[2], width, scale, start is not None, q.dtype, interpret)
    delta = jnp.einsum('bthd,bthd->bht', out, dout, preferred_element_type=jnp.float32)
    flat = lambda x: x.reshape(batch * length, -1)
    arrays = {'q': flat(q), 'k': flat(k), 'v': flat(v), 'dout': flat(dout)}
    arrays |= {'logsumexp': (logsumexp * LOG2E).reshape(-1), 'delta': delta.reshape(-1)}
    ends = {} if start is None else {'start': start.reshape(-1)}
    (dq,) = _queries(call, arrays | ends)
    ends = {} if start is None else {'end': last_queries(start).reshape(-1)}
    dk, dv = _keys(call, arrays | ends)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


# ------------------------------------------------------------------------------------------------------------- kernels
def _queries(call: _Call, arrays: Mapping[str, jax.Array]) -> Any:
    """The gradient of q, flat."""

    def body(ref):
        batch, head = lax.axis_index('batch'), lax.axis_index('heads')
        # The last blocks have most to do, and begin first.
        block = call.length // BLOCK - 1 - lax.axis_index('blocks')
        row = batch * call.length  # of the flat arrays
        first = 0
        if call.packed:
            first = lax.div(ref.start[row + block * BLOCK], TILE)
        count, way = (block + 1) * GROUPS - first, (first, lambda tile: tile + 1)
        own_head = Span(Index(head) * call.width, call.width)
        key_head = Span(Index(lax.div(head, call.shared)) * call.width, call.width)
        rows = lambda tile: Span(Index(batch) * call.length + Index(tile) * TILE, TILE)

        def fetch(tile, slot):
            keys = rows(tile), key_head
            mosaic.fetch([(ref.k, keys, ref.k_), (ref.v, keys, ref.v_)], slot, ref.arrived)

        def compute(group):
            tile = block * GROUPS + group
            own = rows(tile), own_head
            mosaic.fetch([(ref.q, own, ref.q_), (ref.dout, own, ref.dout_)], group, ref.own)
            place = pl.ds((batch * call.heads + head) * call.length + tile * TILE, TILE)
            logsumexp, delta = (mosaic.load(x.at[place], BY_ROW) for x in (ref.logsumexp, ref.delta))
            here = pl.ds(row + tile * TILE, TILE)
            start = mosaic.load(ref.start.at[here], BY_ROW) if call.packed else None
            latest = ref.start[row + tile * TILE + TILE - 1] if call.packed else 0
            plgpu.barrier_wait(ref.own.at[group])

            def turn(slot, place, dq):
                keys = place * TILE

                def products(scores, dp):
                    plgpu.wgmma(scores, ref.q_.at[group], ref.k_.at[slot].T)
                    plgpu.wgmma(dp, ref.dout_.at[group], ref.v_.at[slot].T)
                    weights = _weights(call, plgpu.wgmma_accumulator_load(scores, wait_n=1), _spread(logsumexp, 0))

                    def masked():
                        query, key = tile * TILE + _iota(0), keys + _iota(1)
                        seen = key <= query
                        if call.packed:
                            seen = seen & (key >= _spread(start, 0))
                        return jnp.where(seen, weights, 0.0)

                    some = (keys + TILE > tile * TILE) | (keys < latest)
                    weights = lax.cond(some, masked, lambda: weights)
                    return weights * (plgpu.wgmma_accumulator_load(dp) - _spread(delta, 0))

                tiles = (plgpu.ACC((TILE, TILE), jnp.float32),) * 2
                d_scores = pl.run_scoped(products, *tiles).astype(call.dtype)
                _multiply(ref, group, dq, d_scores, ref.k_.at[slot])
                plgpu.wgmma_wait(0)

            def whole(dq):
                _consume(ref, count, way, lambda slot, place: turn(slot, place, dq))
                return dq[...]

            dq = pl.run_scoped(whole, plgpu.ACC((TILE, call.width), jnp.float32))
            plgpu.commit_smem()  # all of the warpgroup have read the queries, whose place the result takes
            ref.q_.at[group][...] = (dq * call.scale).astype(call.dtype)
            plgpu.commit_smem()
            mosaic.send(ref.q_, ref.dq, own, group)
            plgpu.wait_smem_to_gmem(0)

        _roles(compute, functools.partial(_produce, ref, count, way, fetch))

    own, fetched = ('q', 'dout'), {'k': True, 'v': True}
    grid = {'batch': call.batch, 'heads': call.heads, 'blocks': call.length // BLOCK}
    return _launch('dq', call, body, arrays, {'dq': arrays['q']}, own, fetched, grid)


def _keys(call: _Call, arrays: Mapping[str, jax.Array]) -> Any:
    """The gradients of k and v, flat."""
    grid = {'blocks': call.batch * call.kv_heads * call.length // BLOCK}
    arrays = {**arrays, 'order': order(arrays.get('end'), call.batch, call.length, call.kv_heads).reshape(-1)}

    def body(ref):
        batch, head, block = (ref.order[3 * lax.axis_index('blocks') + i] for i in range(3))
        row = batch * call.length
        first, stop = block * GROUPS, call.length // TILE
        if call.packed:
            stop = lax.div(ref.end[row + block * BLOCK + BLOCK - 1] + (TILE - 1), TILE)
        count = (stop - first) * call.shared
        rows = lambda tile: Span(Index(batch) * call.length + Index(tile) * TILE, TILE)

        # Head by head, each from the last tile to the first: so blocks side by side read the same tiles at a time.
        following = lambda at: (jnp.where(at[0] == first, stop, at[0]) - 1, at[1] + (at[0] == first).astype(jnp.int32))
        way = (jnp.int32(stop - 1), jnp.int32(0)), following

        def fetch(place, slot):
            tile, query_head = place[0], head * call.shared + place[1]
            queries = rows(tile), Span(Index(query_head) * call.width, call.width)
            one = Span(Index(batch * call.heads + query_head) * call.length + Index(tile) * TILE, TILE)
            copies = [(getattr(ref, name), queries, getattr(ref, f'{name}_')) for name in ('q', 'dout')]
            copies += [(getattr(ref, name), (one,), getattr(ref, f'{name}_')) for name in ('logsumexp', 'delta')]
            mosaic.fetch(copies, slot, ref.arrived)

        def compute(group):
            tile = first + group
            own = rows(tile), Span(Index(head) * call.width, call.width)
            mosaic.fetch([(ref.k, own, ref.k_), (ref.v, own, ref.v_)], group, ref.own)
            end = mosaic.load(ref.end.at[pl.ds(row + tile * TILE, TILE)], BY_ROW) if call.packed else None
            earliest = ref.end[row + tile * TILE] if call.packed else call.length
            plgpu.barrier_wait(ref.own.at[group])

            def turn(slot, place, dk, dv):
                queries = place[0] * TILE
                # The group, but the compiler cannot know it: it would keep the addresses of every product of keys and
                # values from turn to turn, for which neither the uniform registers suffice nor the others.
                own_place = group + lax.shift_right_arithmetic(place[0], 24)

                def products(scores, dp):
                    plgpu.wgmma(scores, ref.k_.at[own_place], ref.q_.at[slot].T)
                    plgpu.wgmma(dp, ref.v_.at[own_place], ref.dout_.at[slot].T)
                    logsumexp = mosaic.load(ref.logsumexp_.at[slot], BY_COLUMN)
                    weights = _weights(call, plgpu.wgmma_accumulator_load(scores, wait_n=1), _spread(logsumexp, 1))

                    def masked():
                        # Offsets a row: to add them to the columns' numbers would take as many registers more.
                        key = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=BY_ROW)
                        seen = _iota(1) >= _spread(key + (tile * TILE - queries), 0)
                        if call.packed:
                            seen = seen & (_iota(1) < _spread(end - queries, 0))
                        return jnp.where(seen, weights, 0.0)

                    some = (queries < tile * TILE + TILE) | (queries + TILE > earliest)
                    weights = lax.cond(some, masked, lambda: weights)
                    delta = mosaic.load(ref.delta_.at[slot], BY_COLUMN)
                    d_scores = weights * (plgpu.wgmma_accumulator_load(dp) - _spread(delta, 1))
                    return weights.astype(call.dtype), d_scores.astype(call.dtype)

                weights, d_scores = pl.run_scoped(products, *(plgpu.ACC((TILE, TILE), jnp.float32),) * 2)
                _multiply(ref, group, dv, weights, ref.dout_.at[slot])
                _multiply(ref, group, dk, d_scores, ref.q_.at[slot])
                plgpu.wgmma_wait(0)

            def whole(dk, dv):
                _consume(ref, count, way, lambda slot, place: turn(slot, place, dk, dv))
                return dk[...], dv[...]

            dk, dv = pl.run_scoped(whole, *(plgpu.ACC((TILE, call.width), jnp.float32),) * 2)
            plgpu.commit_smem()
            ref.k_.at[group][...] = (dk * call.scale).astype(call.dtype)
            ref.v_.at[group][...] = dv.astype(call.dtype)
            plgpu.commit_smem()
            mosaic.send(ref.k_, ref.dk, own, group)
            mosaic.send(ref.v_, ref.dv, own, group)
            plgpu.wait_smem_to_gmem(0)

        _roles(compute, functools.partial(_produce, ref, count, way, fetch))

    own, fetched = ('k', 'v'), {'q': True, 'dout': True, 'logsumexp': False, 'delta': False}
    outputs = {'dk': arrays['k'], 'dv': arrays['v']}
    return _launch('dkv', call, body, arrays, outputs, own, fetched, grid)


# ------------------------------------------------------------------------------------------------------ what they share
def _weights(call: _Call, scores: Any, logsumexp: Any) -> Any:
    return jnp.exp2(scores * (call.scale * LOG2E) - logsumexp)


def _multiply(ref: Any, group: Any, sums: Any, tile: Any, other: Any) -> None:
    """Begins `sums += tile other` of a tile in registers, which Mosaic's interpreter takes from shared memory alone."""
    left = getattr(ref, 'left_', None)
    if left is None:
        plgpu.wgmma(sums, tile, other)
    else:
        left.at[group][...] = tile
        plgpu.commit_smem()
        plgpu.wgmma(sums, left.at[group], other)


def _spread(x: Any, axis: int) -> Any:
    """A vector of a tile's axis, over the tile."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (TILE, TILE), (axis,)), plgpu.Layout.WGMMA)


def _iota(axis: int) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA)


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


def _walk(count: Any, way: tuple[Any, Callable[[Any], Any]], turn: Callable[[Any, Any, Any], None]) -> None:
    """`turn(n, slot, place)` of so many places; the way is the first, and what follows a place."""
    first, following = way

    def one(n, carry):
        slot, place = carry
        turn(n, slot, place)
        return jnp.where(slot == SLOTS - 1, 0, slot + 1), following(place)

    lax.fori_loop(0, count, one, (jnp.int32(0), first))


def _produce(ref: Any, count: Any, way: Any, fetch: Callable[[Any, Any], None]) -> None:
    """Fetches tile after tile, each into a slot that all who compute have done with."""

    def one(n, slot, place):
        @pl.when(n >= SLOTS)
        def _():
            plgpu.barrier_wait(ref.used.at[slot])

        fetch(place, slot)

    _walk(count, way, one)


def _consume(ref: Any, count: Any, way: Any, turn: Callable[[Any, Any], None]) -> None:
    def one(n, slot, place):
        plgpu.barrier_wait(ref.arrived.at[slot])
        turn(slot, place)
        plgpu.barrier_arrive(ref.used.at[slot])

    _walk(count, way, one)


def _launch(name, call, body, arrays, outputs, own, fetched, grid):
    """Runs a body: `own` are arrays of which a warpgroup takes one tile, `fetched` (as matrices or not) of many."""
    swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    matrices = lambda count: plgpu.SMEM((count, TILE, call.width), call.dtype, transforms=swizzle)
    scratch = {f'{array}_': matrices(GROUPS) for array in own}
    for array, matrix in fetched.items():
        scratch[f'{array}_'] = matrices(SLOTS) if matrix else plgpu.SMEM((SLOTS, TILE), jnp.float32)
    if call.interpret is not None:
        scratch['left_'] = plgpu.SMEM((GROUPS, TILE, TILE), call.dtype, transforms=swizzle)
    scratch |= {
        'own': plgpu.Barrier(num_arrivals=len(own), num_barriers=GROUPS),
        'arrived': plgpu.Barrier(num_arrivals=len(fetched), num_barriers=SLOTS),
        'used': plgpu.Barrier(num_arrivals=GROUPS, num_barriers=SLOTS),
    }
    names = (*arrays, *outputs, *scratch)
    kernel = plgpu.kernel(
        lambda *refs: body(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()),
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
        kernel_name=f'attention_{name}',
        **({} if call.interpret is None else {'interpret': call.interpret}),
    )
    return kernel(*arrays.values())
