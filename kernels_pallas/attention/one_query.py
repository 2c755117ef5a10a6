"""Attention of one query a row, as in decoding: one product for all key heads, with the cache as it lies."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.reference import PLAIN, More, capped, masked_softmax, visible


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_offset: jax.Array | int,
    scale: float,
    more: More = PLAIN,
) -> jax.Array:
    """Shapes as in `api.attention` with T = 1, also of the result; keys and values are read as [B, S, K * d].

    Block-diagonal queries: a query head has its numbers in its key head's place and zeros in the others'. That is K
    times the multiplications, but these wait for the cache, which a product for each key head reads in strides.
    """
    batch, _, heads, width = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (x.reshape(batch, keys, kv_heads * width) for x in (k, v))
    own = jnp.eye(kv_heads, dtype=q.dtype)[:, None, :, None]  # [K, 1, K, 1]
    wide = (q.reshape(batch, kv_heads, groups, 1, width) * own).reshape(batch, heads, kv_heads * width)
    scores = jnp.einsum('bhc,bsc->bhs', wide, k, preferred_element_type=accumulate) * scale
    indices = q_offset + jnp.arange(1), jnp.arange(keys)
    mask = visible(*indices, segment_ids, kv_segment_ids, more.window, more.places)
    sinks = None if more.sinks is None else more.sinks[:, None]
    weights = masked_softmax(capped(scores, more.cap), mask, sinks)
    out = jnp.einsum('bhs,bsc->bhc', weights.astype(v.dtype), v, preferred_element_type=accumulate)
    # [B, H, K * d], of which a query head keeps the numbers in its key head's place.
    out = jnp.einsum('bkgkd->bkgd', out.reshape(batch, kv_heads, groups, kv_heads, width))
    return out.reshape(q.shape).astype(q.dtype)
