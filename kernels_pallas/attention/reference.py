"""Dense softmax attention, the oracle of the other forms."""

import jax
import jax.numpy as jnp


def visible(
    query_index: jax.Array, key_index: jax.Array, segment_ids: jax.Array | None, kv_segment_ids: jax.Array | None
) -> jax.Array:
    """Mask [B or 1, T, S]: which keys a query sees. Segment 0 is padding and sees nothing."""
    mask = (key_index[None, :] <= query_index[:, None])[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (segment_ids > 0)[:, :, None]
    return mask


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_offset: jax.Array | int,
    scale: float,
) -> jax.Array:
    """Shapes as in `api.attention`; the scores [B, K, G, T, S] exist in full."""
    batch, length, heads, width = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum('btkgd,bskd->bkgts', grouped, k, preferred_element_type=accumulate) * scale
    mask = visible(q_offset + jnp.arange(length), jnp.arange(keys), segment_ids, kv_segment_ids)[:, None, None]
    weights = masked_softmax(scores, mask)
    out = jnp.einsum('bkgts,bskd->btkgd', weights.astype(v.dtype), v, preferred_element_type=accumulate)
    return out.reshape(q.shape).astype(q.dtype)


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Weights over the last axis of scores [..., S], where ``mask``, of a shape that broadcasts, is True; else zero."""
    highest = jnp.max(jnp.where(mask, scores, -jnp.inf), -1, keepdims=True)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - highest, 0)), 0)
    total = jnp.sum(weights, -1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)
