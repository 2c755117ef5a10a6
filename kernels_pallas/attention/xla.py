"""Blockwise causal attention in plain XLA, with a hand-written gradient.

The forward pass keeps one float32 logsumexp a query; the backward pass recomputes a tile's weights from it, so memory
is linear in the number of tokens. Tiles above the diagonal are never visited: the loops over keys and over queries have
bounds computed from the block's index, which a hand-written gradient allows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention.reference import visible
from kernels_pallas.call import KEPT

WIDEST = 16  # blocks of keys a tile of few queries may have: tiles beyond the last filled key are not visited
NEGATIVE = -1e30  # finite, so that a row without a visible key stays free of nan


def attention(q, k, v, segment_ids, kv_segment_ids, q_offset, scale, block_size):
    """Shapes as in `api.attention`; pads queries and keys to whole blocks, where padding is of segment 0."""
    (batch, length, heads, width), (keys, kv_heads) = q.shape, k.shape[1:3]
    groups = heads // kv_heads
    q_block = min(block_size, length)
    # A tile is block_size^2 weights; of few queries it has more keys, since every turn of a loop costs: as many blocks
    # as divide them all, or keys would be copied to be padded.
    blocks = -(-keys // block_size)
    widest = min(block_size // q_block, WIDEST, blocks)
    k_block = min(keys, block_size * max(n for n in range(1, widest + 1) if blocks % n == 0))
    q_steps, k_steps = -(-length // q_block), -(-keys // k_block)
    ragged = keys % k_block or length % q_block
    if segment_ids is None and ragged:
        # Padded keys lie after the real ones, but a q_offset can bring them below the diagonal.
        segment_ids, kv_segment_ids = jnp.ones((batch, length), jnp.int32), jnp.ones((batch, keys), jnp.int32)

    def split(x, steps, block):  # [B, T, ...] -> [steps, B, block, ...]
        x = jnp.pad(x, ((0, 0), (0, steps * block - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, steps, block, *x.shape[2:]), 1, 0)

    # [steps, B, K, G, block, d]. Keys and values stay as they came, [B, steps * block, K, d]: they may be a cache, of
    # which few queries read the part that is filled, and a copy would cost more than that.
    q = split(q, q_steps, q_block).reshape(q_steps, batch, q_block, kv_heads, groups, width).transpose(0, 1, 3, 4, 2, 5)
    k, v = (jnp.pad(x, ((0, 0), (0, k_steps * k_block - keys), (0, 0), (0, 0))) for x in (k, v))
    k, v = (x.reshape(batch, k_steps, k_block, kv_heads, width) for x in (k, v))
    segments = None
    if segment_ids is not None:
        segments = split(segment_ids, q_steps, q_block), split(kv_segment_ids, k_steps, k_block)
    out = _blockwise(q, k, v, segments, jnp.asarray(q_offset, jnp.int32), scale)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, q_steps * q_block, heads, width)[:, :length]


def _keys(x, j):
    """Block j of keys or values, [B, K, block, d]."""
    return jnp.swapaxes(lax.dynamic_index_in_dim(x, j, 1, keepdims=False), 1, 2)


def _take(x, i):
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False), x)


def _loop(lower, upper, body, init, steps):
    """`fori_loop` over blocks; a single block needs no loop (the caller's mask covers an empty range)."""
    return body(0, init) if steps == 1 else lax.fori_loop(lower, upper, body, init)


def _map(body, steps):
    if steps == 1:
        return jax.tree.map(lambda x: x[None], body(0))
    return lax.map(body, jnp.arange(steps))


def _tile(q, k, segments, i, j, q_offset, scale):
    """Scores [B, K, G, t, s] and mask of query block i and key block j."""
    q_block, k_block = q.shape[-2], k.shape[-2]
    scores = jnp.einsum('bkgtd,bksd->bkgts', q, k, preferred_element_type=_accumulate(q)) * scale
    q_segments, k_segments = (None, None) if segments is None else (segments[0], segments[1])
    query_index = q_offset + i * q_block + jnp.arange(q_block)
    mask = visible(query_index, j * k_block + jnp.arange(k_block), q_segments, k_segments)
    return scores, mask[:, None, None]


def _accumulate(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _forward_block(q, k, v, segments, i, q_offset, scale):
    """Output [B, K, G, t, d] and logsumexp [B, K, G, t] of query block i."""
    (steps, k_block), q_block = k.shape[1:3], q.shape[-2]
    q_i, seg_i = _take(q, i), None if segments is None else _take(segments[0], i)

    def body(j, carry):
        out, highest, total = carry
        k_j, v_j = _keys(k, j), _keys(v, j)
        seg = None if segments is None else (seg_i, _take(segments[1], j))
        scores, mask = _tile(q_i, k_j, seg, i, j, q_offset, scale)
        new = jnp.maximum(highest, jnp.max(jnp.where(mask, scores, NEGATIVE), -1))
        weights = jnp.where(mask, jnp.exp(scores - new[..., None]), 0)
        shrink = jnp.exp(highest - new)
        out = out * shrink[..., None] + jnp.einsum(
            'bkgts,bksd->bkgtd', weights.astype(v.dtype), v_j, preferred_element_type=_accumulate(q)
        )
        return out, new, total * shrink + jnp.sum(weights, -1)

    zero = jnp.zeros(q_i.shape, _accumulate(q))
    last = jnp.clip((q_offset + (i + 1) * q_block + k_block - 1) // k_block, 0, steps)
    init = (zero, jnp.full(zero.shape[:-1], NEGATIVE, zero.dtype), zero[..., 0])
    out, highest, total = _loop(0, last, body, init, steps)
    total = jnp.where(total == 0, 1, total)
    return (out / total[..., None]).astype(q.dtype), highest + jnp.log(total)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(q, k, v, segments, q_offset, scale):
    return _forward(q, k, v, segments, q_offset, scale)[0]


def _forward(q, k, v, segments, q_offset, scale):
    out, logsumexp = _map(lambda i: _forward_block(q, k, v, segments, i, q_offset, scale), q.shape[0])
    out, logsumexp = (checkpoint_name(x, KEPT) for x in (out, logsumexp))
    return out, (q, k, v, segments, q_offset, out, logsumexp)


def _backward(scale, residuals, g):
    q, k, v, segments, q_offset, out, logsumexp = residuals
    accumulate = _accumulate(q)
    delta = jnp.sum(g.astype(accumulate) * out.astype(accumulate), -1)
    q_steps, q_block, (k_steps, k_block) = q.shape[0], q.shape[-2], k.shape[1:3]
    product = partial(jnp.einsum, preferred_element_type=accumulate)

    def key_block(j, dq):
        """dk and dv of key block j; adds its share of dq, which all key blocks accumulate."""
        k_j, v_j = _keys(k, j), _keys(v, j)
        seg_j = None if segments is None else _take(segments[1], j)

        def body(i, carry):
            dq, dk, dv = carry
            q_i, g_i, logsumexp_i, delta_i = _take((q, g, logsumexp, delta), i)
            seg = None if segments is None else (_take(segments[0], i), seg_j)
            scores, mask = _tile(q_i, k_j, seg, i, j, q_offset, scale)
            weights = jnp.where(mask, jnp.exp(scores - logsumexp_i[..., None]), 0)
            d_scores = weights * (product('bkgtd,bksd->bkgts', g_i, v_j) - delta_i[..., None]) * scale
            d_scores = d_scores.astype(q.dtype)
            dv = dv + product('bkgts,bkgtd->bksd', weights.astype(q.dtype), g_i)
            dk = dk + product('bkgts,bkgtd->bksd', d_scores, q_i)
            dq_i = _take(dq, i) + product('bkgts,bksd->bkgtd', d_scores, k_j)
            return lax.dynamic_update_index_in_dim(dq, dq_i, i, 0), dk, dv

        first = jnp.clip((j * k_block - q_offset) // q_block, 0, q_steps)
        zero = jnp.zeros(k_j.shape, accumulate)
        return _loop(first, q_steps, body, (dq, zero, zero), q_steps)

    dq = jnp.zeros(q.shape, accumulate)
    if k_steps == 1:
        dq, dk, dv = key_block(0, dq)
        dk, dv = dk[None], dv[None]
    else:

        def step(dq, j):
            dq, dk, dv = key_block(j, dq)
            return dq, (dk, dv)

        dq, (dk, dv) = lax.scan(step, dq, jnp.arange(k_steps))
    dk, dv = (x.transpose(1, 0, 3, 2, 4) for x in (dk, dv))  # [steps, B, K, block, d] as k and v are
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_blockwise.defvjp(_forward, _backward)
