"""Blockwise causal attention in plain XLA, with a hand-written gradient.

The forward pass keeps one float32 logsumexp a query; the backward pass recomputes a tile's weights from it, so memory
is linear in the number of tokens. Both go once through a list of the tiles that hold a visible key, row after row: one
loop, whose length is a number known to the compiler wherever the list is.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import platform
from kernels_pallas.attention.reference import PLAIN, capped, visible
from kernels_pallas.call import KEPT

LARGEST = {'gpu': 1024}  # queries and keys a tile where the caller does not say; a CPU's caches hold one of 256
ELSEWHERE = 256
LANES = 128  # a tile's sides are multiples of it
WIDEST = 16  # blocks of keys a tile of few queries may have: tiles beyond the last filled key are not visited
NEGATIVE = -1e30  # finite, so that a row without a visible key stays free of nan


def tile_size(keys: int, block_size: int | None = None) -> int:
    """Keys a tile: `block_size`, or for None as many as the platform takes well, so that tiles share `keys` evenly."""
    if block_size:
        return block_size
    largest = LARGEST.get(platform.platform(), ELSEWHERE)
    return LANES * math.ceil(keys / math.ceil(max(keys, 1) / largest) / LANES) or LANES


def whole_tiles(keys: int, block_size: int | None = None) -> int:
    """`keys`, at least, that need no padding: those of one tile, or a whole number of tiles."""
    size = tile_size(keys, block_size)
    return keys if keys <= size else -(-keys // size) * size


def _blocks(length: int, keys: int, block_size: int | None) -> tuple[int, int]:
    """Queries and keys a tile.

    It is block_size^2 weights; of few queries it has more keys, since every turn of a loop costs: as many blocks as
    divide them all, or keys would be copied to be padded.
    """
    block_size = tile_size(keys, block_size)
    q_block, blocks = min(block_size, length), -(-keys // block_size)
    widest = min(block_size // q_block, WIDEST, blocks)
    return q_block, min(keys, block_size * max(n for n in range(1, widest + 1) if blocks % n == 0))


def turns(length: int, keys: int, q_offset: int, block_size: int | None = None) -> int:
    """Turns of the loop over tiles where a q_offset is traced that will be this one; documents are not looked at."""
    q_block, k_block = _blocks(length, keys, block_size)
    return int(_below(q_block, -(-length // q_block), k_block, -(-keys // k_block), q_offset).sum())


def _below(q_block: int, q_steps: int, k_block: int, k_steps: int, q_offset: Any) -> Any:
    """Bool [q_steps, k_steps]: the tiles with a key that is not after all their queries."""
    return np.arange(k_steps) * k_block <= _last(q_block, q_steps, q_offset)[:, None]


def _last(q_block: int, q_steps: int, q_offset: Any) -> Any:
    """The last query of each block, by the index of its key."""
    return q_offset + (np.arange(q_steps) + 1) * q_block - 1


class _Static(NamedTuple):
    """What the compiler knows of a call; `from_start`: that the first query is the first key."""

    q_block: int
    q_steps: int
    k_block: int
    k_steps: int
    scale: float
    from_start: bool
    window: int | None = None
    cap: float | None = None


def attention(q, k, v, segment_ids, kv_segment_ids, q_offset, scale, block_size=None, more=PLAIN):
    """Shapes as in `api.attention`; tiles at the end are padded, where padding is of segment 0."""
    length, keys = q.shape[1], k.shape[1]
    q_block, k_block = _blocks(length, keys, block_size)
    from_start = isinstance(q_offset, int) and q_offset == 0
    static = _Static(
        q_block, -(-length // q_block), k_block, -(-keys // k_block), scale, from_start, more.window, more.cap
    )
    beyond = from_start and length <= keys  # padded keys, which lie after the real ones, are above the diagonal
    if segment_ids is None and not beyond and (keys % k_block or length % q_block):
        segment_ids = jnp.ones((q.shape[0], length), jnp.int32)
        kv_segment_ids = jnp.ones((q.shape[0], keys), jnp.int32)
    segments = None if segment_ids is None else (segment_ids, kv_segment_ids, *(more.places or ()))
    return _blockwise(q, k, v, segments, jnp.asarray(q_offset, jnp.int32), more.sinks, static)


# --------------------------------------------------------------------------------------------------- which tiles
class _Plan(NamedTuple):
    """Turn p of the loop does the tile of query block `i[p]` and key block `j[p]`; `count` turns do."""

    i: Any
    j: Any
    first: Any  # whether it is the first of its query block
    count: Any


def _plan(static: _Static, segments: Any, q_offset: Any) -> _Plan:
    """The tiles below the diagonal, row after row; off GPUs without those whose documents no query of them is of.

    Which documents meet is only known to the device, and so is then the number of turns. A GPU's host would wait for it
    at every turn; there the list hangs on shapes alone, and tiles of other documents are masked. A q_offset that is
    traced has a list of its own on every platform.
    """
    offset = 0 if static.from_start else q_offset
    last = _last(static.q_block, static.q_steps, offset)
    wanted: Any = _below(*static[:4], offset)
    if static.window is not None and (segments is None or len(segments) == 2):  # or positions tell, not indices
        wanted = wanted & ((np.arange(static.k_steps) + 1) * static.k_block > _first(static, last)[:, None])
    most = int(wanted.sum()) if static.from_start else static.q_steps * static.k_steps
    by_documents = segments is not None and platform.platform() != 'gpu'
    if by_documents:
        wanted = wanted & _meet(segments[:2])
    if static.from_start and not by_documents:
        i, j = np.nonzero(wanted)
        return _Plan(i, j, np.diff(i, prepend=-1) != 0, most)
    i, j = jnp.nonzero(wanted, size=most, fill_value=0)
    return _Plan(i, j, jnp.diff(i, prepend=-1) != 0, jnp.sum(wanted, dtype=jnp.int32))


def _first(static: _Static, last: Any) -> Any:
    """The first key that the window of any query of each block holds."""
    return last - static.q_block + 2 - (static.window or 0)


def _meet(segments: Any) -> jax.Array:
    """Bool [q_steps, k_steps]: whether in some row both blocks have documents of the same range of numbers."""

    def ends(x):
        real = x > 0
        return jnp.min(jnp.where(real, x, np.iinfo(x.dtype).max), -1), jnp.max(jnp.where(real, x, 0), -1)

    (q_low, q_high), (k_low, k_high) = map(ends, segments)  # [steps, B]
    return jnp.any((k_low[None] <= q_high[:, None]) & (k_high[None] >= q_low[:, None]), -1)


def _turns(plan: _Plan, tile: Any, carry: Any) -> Any:
    """`carry = tile(i, j, first, carry)` for every tile of the list; where there can be but one, without a loop."""
    if len(plan.i) == 1:  # the mask covers a tile that is not wanted
        return tile(0, 0, True, carry)
    i, j, first = map(jnp.asarray, plan[:3])

    def turn(at):
        p, carry = at
        return p + 1, tile(i[p], j[p], first[p], carry)

    # No `fori_loop`: of a count that is a number it makes a scan, out of which JAX's partial evaluation, in a scan over
    # layers, takes what hangs on no query or key. That is the masks of all tiles at once.
    return lax.while_loop(lambda at: at[0] < plan.count, turn, (jnp.int32(0), carry))[1]


# ------------------------------------------------------------------------------------------------------- the layout
def _padded(x, steps, block):
    return jnp.pad(x, ((0, 0), (0, steps * block - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _split(x, steps, block):
    """[B, T, ...] -> [steps, B, block, ...]."""
    return jnp.moveaxis(_padded(x, steps, block).reshape(x.shape[0], steps, block, *x.shape[2:]), 1, 0)


def _queries(x, static, kv_heads):
    """[B, T, H, d] -> [steps, B, K, G, block, d], or the same without d."""
    x = _split(x, static.q_steps, static.q_block)
    steps, batch, block, heads, *width = x.shape
    return jnp.moveaxis(x.reshape(steps, batch, block, kv_heads, heads // kv_heads, *width), 2, 4)


def _tiled(q, k, v, segments, static):
    """Queries, keys, values and segments as tiles take them.

    Keys and values stay as they came, [B, steps, block, K, d]: they may be a cache, of which few queries read the part
    that is filled, and a copy would cost more than that.
    """
    shape = k.shape[0], static.k_steps, static.k_block, *k.shape[2:]
    k_tiles, v_tiles = (_padded(x, static.k_steps, static.k_block).reshape(shape) for x in (k, v))
    if segments is not None:
        sides = (static.q_steps, static.q_block), (static.k_steps, static.k_block)  # of queries and keys in turn
        segments = tuple(_split(x, *sides[n % 2]) for n, x in enumerate(segments))
    return _queries(q, static, k.shape[2]), k_tiles, v_tiles, segments


def _keys(x, j):
    """Block j of keys or values, [B, K, block, d]."""
    return jnp.swapaxes(lax.dynamic_index_in_dim(x, j, 1, keepdims=False), 1, 2)


def _take(x, i):
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False), x)


def _put_queries(x, block, i):
    """Writes block i, [B, K, G, block, d], into [B, T, H, d]."""
    batch, kv_heads, groups, size, width = block.shape
    rows = block.transpose(0, 3, 1, 2, 4).reshape(batch, size, kv_heads * groups, width)
    return lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), i * size, 1)


def _scores(q_i, k_j, segments, i, j, q_offset, static):
    """Scores [B, K, G, t, s] and mask of query block i and key block j."""
    scores = jnp.einsum('bkgtd,bksd->bkgts', q_i, k_j, preferred_element_type=_accumulate(q_i)) * static.scale
    parts = [None, None] if segments is None else [_take(x, (i, j)[n % 2]) for n, x in enumerate(segments)]
    q_segments, k_segments, *places = parts
    query_index = q_offset + i * static.q_block + jnp.arange(static.q_block)
    key_index = j * static.k_block + jnp.arange(static.k_block)
    mask = visible(query_index, key_index, q_segments, k_segments, static.window, tuple(places) or None)
    return capped(scores, static.cap), mask[:, None, None]


def _accumulate(x):
    return jnp.promote_types(x.dtype, jnp.float32)


# ------------------------------------------------------------------------------------------------------ both passes
@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blockwise(q, k, v, segments, q_offset, sinks, static):
    return _forward(q, k, v, segments, q_offset, sinks, static)[0]


def _forward(q, k, v, segments, q_offset, sinks, static):
    (batch, length, heads, width), wide = q.shape, _accumulate(q)
    tiles = _tiled(q, k, v, segments, static)
    queries, keys, values, seg = tiles
    plan = _plan(static, seg, q_offset)

    def tile(i, j, first, carry):
        """Adds a tile to its queries' sums, and writes what they come to so far."""
        out, logsumexp, sums, highest, total = carry
        v_j = _keys(values, j)
        scores, mask = _scores(_take(queries, i), _keys(keys, j), seg, i, j, q_offset, static)
        highest, total = jnp.where(first, NEGATIVE, highest), jnp.where(first, 0, total)
        new = jnp.maximum(highest, jnp.max(jnp.where(mask, scores, NEGATIVE), -1))
        weights = jnp.where(mask, jnp.exp(scores - new[..., None]), 0)
        shrink = jnp.exp(highest - new)
        sums = jnp.where(first, 0, sums * shrink[..., None]) + jnp.einsum(
            'bkgts,bksd->bkgtd', weights.astype(v.dtype), v_j, preferred_element_type=wide
        )
        total = total * shrink + jnp.sum(weights, -1)
        some = jnp.where(total == 0, 1, total)
        out = _put_queries(out, sums / some[..., None], i)
        logsumexp = lax.dynamic_update_index_in_dim(logsumexp, new + jnp.log(some), i, 0)
        return out, logsumexp, sums, new, total

    zero = jnp.zeros(queries.shape[1:], wide)
    out = jnp.zeros((batch, static.q_steps * static.q_block, heads, width), q.dtype)
    logsumexp = jnp.full(queries.shape[:-1], NEGATIVE, wide)
    out, logsumexp, *_ = _turns(plan, tile, (out, logsumexp, zero, logsumexp[0], zero[..., 0]))
    out = out[:, :length]
    if sinks is not None:  # a score more, of a value of zero
        sink = _by_head(sinks, k.shape[2], wide)
        share = jnp.moveaxis(jax.nn.sigmoid(logsumexp - sink), (0, 4), (1, 2)).reshape(batch, -1, heads)[:, :length]
        out = (out * share[..., None]).astype(q.dtype)
        logsumexp = jnp.logaddexp(logsumexp, sink)
    out, logsumexp = (checkpoint_name(x, KEPT) for x in (out, logsumexp))
    return out, (q, k, v, segments, q_offset, sinks, out, logsumexp)


def _backward(static, residuals, g):
    q, k, v, segments, q_offset, sinks, out, logsumexp = residuals
    (batch, length, heads, width), kept, wide = q.shape, k.shape[1], _accumulate(q)
    queries, keys, values, seg = _tiled(q, k, v, segments, static)
    delta = _queries(jnp.sum(g.astype(wide) * out.astype(wide), -1), static, k.shape[2])
    gradients = _queries(g, static, k.shape[2])
    product = partial(jnp.einsum, preferred_element_type=wide)
    plan = _plan(static, seg, q_offset)

    def tile(i, j, first, carry):
        """Adds a tile's share of its queries', keys' and values' gradients."""
        dq, dk, dv, dq_i = carry
        q_i, g_i, logsumexp_i, delta_i = _take((queries, gradients, logsumexp, delta), i)
        k_j, v_j = _keys(keys, j), _keys(values, j)
        scores, mask = _scores(q_i, k_j, seg, i, j, q_offset, static)
        weights = jnp.where(mask, jnp.exp(scores - logsumexp_i[..., None]), 0)
        d_scores = weights * (product('bkgtd,bksd->bkgts', g_i, v_j) - delta_i[..., None]) * static.scale
        if static.cap is not None:
            d_scores = d_scores * (1 - (scores / static.cap) ** 2)
        d_scores = d_scores.astype(q.dtype)
        dq_i = jnp.where(first, 0, dq_i) + product('bkgts,bksd->bkgtd', d_scores, k_j)
        # Keys last, as the tile's weights have them: what is turned round for a product is the smaller array.
        dk_j = _take(dk, j) + product('bkgtd,bkgts->bkds', q_i, d_scores)
        dv_j = _take(dv, j) + product('bkgtd,bkgts->bkds', g_i, weights.astype(q.dtype))
        dk, dv = (lax.dynamic_update_index_in_dim(x, x_j, j, 0) for x, x_j in ((dk, dk_j), (dv, dv_j)))
        return _put_queries(dq, dq_i, i), dk, dv, dq_i

    # Each block of queries is done once and for all; keys, of which there are fewer heads, wait in float32.
    dq = jnp.zeros((batch, static.q_steps * static.q_block, heads, width), q.dtype)
    zero = jnp.zeros((static.k_steps, batch, k.shape[2], width, static.k_block), wide)
    dq, dk, dv, _ = _turns(plan, tile, (dq, zero, zero, jnp.zeros(queries.shape[1:], wide)))
    join = lambda x: x.transpose(1, 0, 4, 2, 3).reshape(batch, -1, *k.shape[2:])[:, :kept]
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(_by_head(sinks, k.shape[2], wide) - logsumexp)
        d_sinks = -jnp.sum(share * delta, (0, 1, 4)).reshape(sinks.shape).astype(sinks.dtype)
    return dq[:, :length], join(dk.astype(k.dtype)), join(dv.astype(v.dtype)), None, None, d_sinks


def _by_head(sinks, kv_heads, wide):
    """[H] -> [1, 1, K, G, 1], as the logsumexp lies."""
    return sinks.astype(wide).reshape(1, 1, kv_heads, -1, 1)


_blockwise.defvjp(_forward, _backward)
