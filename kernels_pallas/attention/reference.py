"""Dense softmax attention, the oracle of the other forms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class More(NamedTuple):
    """What a call asks for beside plain causal attention; as in `api.attention`."""

    window: int | None = None
    cap: float | None = None
    sinks: jax.Array | None = None  # [H]
    places: tuple[jax.Array, jax.Array] | None = None  # positions of queries [B, T] and keys [B, S], with a window


PLAIN = More()


def visible(
    query_index: jax.Array,
    key_index: jax.Array,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    window: int | None = None,
    places: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Mask [B or 1, T, S]: which keys a query sees. Segment 0 is padding and sees nothing.

    A window is of the last keys by their positions [B, T] and [B, S] if `places` has them, else by their indices.
    """
    mask = (key_index[None, :] <= query_index[:, None])[None]
    if window is not None:
        query, key = (query_index[None], key_index[None]) if places is None else places
        mask = mask & (query[:, :, None] - key[:, None, :] < window)
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
    more: More = PLAIN,
) -> jax.Array:
    """Shapes as in `api.attention`; the scores [B, K, G, T, S] exist in full."""
    batch, length, heads, width = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum('btkgd,bskd->bkgts', grouped, k, preferred_element_type=accumulate) * scale
    indices = q_offset + jnp.arange(length), jnp.arange(keys)
    mask = visible(*indices, segment_ids, kv_segment_ids, more.window, more.places)[:, None, None]
    sinks = None if more.sinks is None else more.sinks.reshape(kv_heads, -1, 1, 1)
    weights = masked_softmax(capped(scores, more.cap), mask, sinks)
    out = jnp.einsum('bkgts,bskd->btkgd', weights.astype(v.dtype), v, preferred_element_type=accumulate)
    return out.reshape(q.shape).astype(q.dtype)


def capped(scores: jax.Array, cap: float | None) -> jax.Array:
    """Scores that come no further than `cap` from zero."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def masked_softmax(scores: jax.Array, mask: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """Weights over the last axis of scores [..., S], where ``mask``, of a shape that broadcasts, is True; else zero.

    Sinks [..., 1] take part as a score without a weight.
    """
    highest = jnp.max(jnp.where(mask, scores, -jnp.inf), -1, keepdims=True)
    highest = highest if sinks is None else jnp.maximum(highest, sinks.astype(highest.dtype))
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - highest, 0)), 0)
    total = jnp.sum(weights, -1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks.astype(highest.dtype) - highest)
    return weights / jnp.where(total == 0, 1, total)
