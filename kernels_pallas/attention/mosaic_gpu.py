"""Attention's gradient for Hopper GPUs, in Pallas Mosaic: blocks that no document of theirs reaches are not visited.

With `P = exp(S - logsumexp)` of a tile computed anew and `delta = sum(dO * O)`, two kernels make what they need:

* dq: `dS = P * (dO V^T - delta)`, `dQ += dS K`. A block of queries goes through the keys from its first query's first
  key to its own end.
* dk and dv: the same tile lying down, keys by queries, so that weights and dS leave the registers for no product:
  `dV += P^T dO`, `dK += dS^T Q`. A block of keys goes through the queries from its own to the last that sees its last
  key, of all query heads that share its head, whose sum stays in registers.

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
SLOTS = 2  # tiles in flight
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
        count = (block + 1) * GROUPS - first
        own_head = Span(Index(head) * call.width, call.width)
        key_head = Span(Index(lax.div(head, call.shared)) * call.width, call.width)
        rows = lambda tile: Span(Index(batch) * call.length + Index(tile) * TILE, TILE)

        def fetch(turn, slot):
            keys = rows(first + turn), key_head
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

            def turn(slot, n, dq):
                keys = (first + n) * TILE

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
                _consume(ref, count, lambda slot, n: turn(slot, n, dq))
                return dq[...]

            dq = pl.run_scoped(whole, plgpu.ACC((TILE, call.width), jnp.float32))
            plgpu.commit_smem()  # all of the warpgroup have read the queries, whose place the result takes
            ref.q_.at[group][...] = (dq * call.scale).astype(call.dtype)
            plgpu.commit_smem()
            mosaic.send(ref.q_, ref.dq, own, group)
            plgpu.wait_smem_to_gmem(0)

        _roles(compute, functools.partial(_produce, ref, count, fetch))

    own, fetched = ('q', 'dout'), {'k': True, 'v': True}
    grid = {'batch': call.batch, 'heads': call.heads, 'blocks': call.length // BLOCK}
    return _launch('dq', call, body, arrays, {'dq': arrays['q']}, own, fetched, grid)


def _keys(call: _Call, arrays: Mapping[str, jax.Array]) -> Any:
    """The gradients of k and v, flat."""

    def body(ref):
        batch, head, block = lax.axis_index('batch'), lax.axis_index('heads'), lax.axis_index('blocks')
        row = batch * call.length
        first, stop = block * GROUPS, call.length // TILE
        if call.packed:
            stop = lax.div(ref.end[row + block * BLOCK + BLOCK - 1] + (TILE - 1), TILE)
        count = (stop - first) * call.shared
        rows = lambda tile: Span(Index(batch) * call.length + Index(tile) * TILE, TILE)
        query_tile = lambda n: first + lax.div(n, call.shared)

        def fetch(n, slot):
            tile, query_head = query_tile(n), head * call.shared + lax.rem(n, call.shared)
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

            def turn(slot, n, dk, dv):
                queries = query_tile(n) * TILE

                def compute_weights(scores):
                    plgpu.wgmma(scores, ref.k_.at[group], ref.q_.at[slot].T)
                    logsumexp = mosaic.load(ref.logsumexp_.at[slot], BY_COLUMN)
                    weights = _weights(call, plgpu.wgmma_accumulator_load(scores), _spread(logsumexp, 1))

                    def masked():
                        # Offsets a row: to add them to the columns' numbers would take as many registers more.
                        key = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=BY_ROW)
                        seen = _iota(1) >= _spread(key + (tile * TILE - queries), 0)
                        if call.packed:
                            seen = seen & (_iota(1) < _spread(end - queries, 0))
                        return jnp.where(seen, weights, 0.0)

                    some = (queries < tile * TILE + TILE) | (queries + TILE > earliest)
                    return lax.cond(some, masked, lambda: weights)

                weights = pl.run_scoped(compute_weights, plgpu.ACC((TILE, TILE), jnp.float32))

                def compute_d_scores(dp):
                    plgpu.wgmma(dp, ref.v_.at[group], ref.dout_.at[slot].T)
                    _multiply(ref, group, dv, weights.astype(call.dtype), ref.dout_.at[slot])
                    delta = mosaic.load(ref.delta_.at[slot], BY_COLUMN)
                    return weights * (plgpu.wgmma_accumulator_load(dp, wait_n=1) - _spread(delta, 1))

                d_scores = pl.run_scoped(compute_d_scores, plgpu.ACC((TILE, TILE), jnp.float32))
                _multiply(ref, group, dk, d_scores.astype(call.dtype), ref.q_.at[slot])
                plgpu.wgmma_wait(0)

            def whole(dk, dv):
                _consume(ref, count, lambda slot, n: turn(slot, n, dk, dv))
                return dk[...], dv[...]

            sums = (plgpu.ACC((TILE, call.width), jnp.float32),) * 2
            dk, dv = pl.run_scoped(whole, *sums)
            plgpu.commit_smem()
            ref.k_.at[group][...] = (dk * call.scale).astype(call.dtype)
            ref.v_.at[group][...] = dv.astype(call.dtype)
            plgpu.commit_smem()
            mosaic.send(ref.k_, ref.dk, own, group)
            mosaic.send(ref.v_, ref.dv, own, group)
            plgpu.wait_smem_to_gmem(0)

        _roles(compute, functools.partial(_produce, ref, count, fetch))

    own, fetched = ('k', 'v'), {'q': True, 'dout': True, 'logsumexp': False, 'delta': False}
    grid = {'batch': call.batch, 'heads': call.kv_heads, 'blocks': call.length // BLOCK}
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


def _produce(ref: Any, count: Any, fetch: Callable[[Any, Any], None]) -> None:
    """Fetches tile after tile, each into a slot that all who compute have done with."""

    def one(n, _):
        slot = lax.rem(n, SLOTS)

        @pl.when(n >= SLOTS)
        def _():
            plgpu.barrier_wait(ref.used.at[slot])

        fetch(n, slot)

    lax.fori_loop(0, count, one, None)


def _consume(ref: Any, count: Any, turn: Callable[[Any, Any], None]) -> None:
    def one(n, _):
        slot = lax.rem(n, SLOTS)
        plgpu.barrier_wait(ref.arrived.at[slot])
        turn(slot, n)
        plgpu.barrier_arrive(ref.used.at[slot])

    lax.fori_loop(0, count, one, None)


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
