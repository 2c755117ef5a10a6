"""Attention's one entry point: checks shapes and picks an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import choice
from kernels_pallas.attention import one_query, reference, xla

IMPLEMENTATIONS = ('reference', 'blockwise', 'one_query')


def attention(
    q: Float[Array, 'b t h d'],
    k: Float[Array, 'b s k d'],
    v: Float[Array, 'b s k d'],
    *,
    segment_ids: Int[Array, 'b t'] | None = None,
    kv_segment_ids: Int[Array, 'b s'] | None = None,
    q_offset: int | Int[Array, ''] = 0,
    scale: float | None = None,
    implementation: str | None = None,
    block_size: int = 256,
) -> Float[Array, 'b t h d']:
    """Causal softmax attention: query t sees keys `s <= q_offset + t` of its own segment.

    Softmax and accumulation are float32 (float64 for float64 inputs) whatever the type of q, k and v.

    Args:
      q: queries [B, T, H, d]; k, v: keys and values [B, S, K, d] with K a divisor of H: query heads
        `i * H/K ... (i+1) * H/K - 1` share key head i, which is never repeated in memory.
      segment_ids: [B, T] document of each query, 0 for padding; a query sees only keys of the same non-zero segment,
        and one that sees no key gives 0.
      kv_segment_ids: [B, S] document of each key; segment_ids if None, which needs S = T.
      q_offset: index of the first query among the keys (how much a cache already holds); may be traced.
      scale: of the scores; 1/sqrt(d) if None.
      implementation: None picks for the shapes; 'reference' (dense), 'blockwise' (memory linear in T and S, both
        ways) or 'one_query' (T = 1, as in decoding).
      block_size: queries and keys a tile of 'blockwise'.

    Returns:
      [B, T, H, d] in q's type.

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist.
    """
    choice.check_known('attention', implementation, IMPLEMENTATIONS)
    segment_ids, kv_segment_ids = _check(q, k, v, segment_ids, kv_segment_ids)
    if block_size < 1:
        raise ValueError(f'attention: block_size must be at least 1, got {block_size}')
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation is None:
        implementation = 'one_query' if q.shape[1] == 1 else 'blockwise'
    arguments = q, k, v, segment_ids, kv_segment_ids, q_offset, scale
    if implementation == 'blockwise':
        return xla.attention(*arguments, block_size)
    if implementation == 'reference':
        return reference.attention(*arguments)
    if q.shape[1] != 1:
        raise ValueError(f"attention: 'one_query' takes one query a row, q has shape {tuple(q.shape)}")
    return one_query.attention(*arguments)


def _check(q, k, v, segment_ids, kv_segment_ids):
    if q.ndim != 4:
        raise ValueError(f'attention: q has shape {tuple(q.shape)}, expected [batch, queries, heads, head_dim]')
    batch, length, heads, width = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[3]) != (batch, width):
        raise ValueError(f'attention: k has shape {tuple(k.shape)}, expected ({batch}, keys, kv_heads, {width})')
    if v.shape != k.shape:
        raise ValueError(f'attention: v has shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}')
    keys, kv_heads = k.shape[1], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f'attention: k has {kv_heads} heads, expected a divisor of the {heads} query heads')
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError('attention: kv_segment_ids is given without segment_ids')
    if segment_ids is not None:
        if kv_segment_ids is None:
            if keys != length:
                raise ValueError(f'attention: kv_segment_ids is needed, as there are {keys} keys and {length} queries')
            kv_segment_ids = segment_ids
        for name, value, shape in (
            ('segment_ids', segment_ids, (batch, length)),
            ('kv_segment_ids', kv_segment_ids, (batch, keys)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(f'attention: {name} has shape {tuple(value.shape)}, expected {shape}')
        segment_ids, kv_segment_ids = segment_ids.astype(jnp.int32), kv_segment_ids.astype(jnp.int32)
    return segment_ids, kv_segment_ids
