"""Attention's one entry point: checks shapes and picks an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import cudnn, one_query, reference, tokamax, xla
from kernels_pallas.call import sizes
from kernels_pallas.dispatch import Candidate, choose

WORDS = {'b': 'batch', 't': 'queries >= 1', 'h': 'heads', 'd': 'head_dim', 's': 'keys >= 1', 'k': 'kv_heads'}


def attention(
    q: Float[Array, 'b t h d'],
    k: Float[Array, 'b s k d'],
    v: Float[Array, 'b s k d'],
    *,
    segment_ids: Int[Array, 'b t'] | None = None,
    kv_segment_ids: Int[Array, 'b s'] | None = None,
    q_offset: int | Int[Array, ''] = 0,
    scale: float | None = None,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: Float[Array, ' h'] | None = None,
    positions: Int[Array, 'b t'] | None = None,
    kv_positions: Int[Array, 'b s'] | None = None,
    implementation: str | None = None,
    block_size: int | None = None,
) -> Float[Array, 'b t h d']:
    """Causal softmax attention: query t sees keys `s <= q_offset + t` of its own segment.

    Softmax and accumulation are float32 (float64 for float64 inputs) whatever the type of q, k and v.

    Args:
      q: queries [B, T, H, d]; k, v: keys and values [B, S, K, d] with K a divisor of H: query heads
        `i * H/K ... (i+1) * H/K - 1` share key head i, which is never repeated in memory.
      segment_ids: [B, T] document of each query, 0 for padding; a query sees only keys of the same non-zero segment,
        and one that sees no key gives 0. Where 'tokamax' runs, a document's tokens must lie side by side.
      kv_segment_ids: [B, S] document of each key; segment_ids if None, which needs S = T.
      q_offset: index of the first query among the keys (how much a cache already holds); may be traced.
      scale: of the scores; 1/sqrt(d) if None.
      window: a query sees this many keys at most, itself included (Beltagy et al., 2020); 'blockwise' does not visit
        tiles outside it.
      logit_cap: scores are `cap * tanh(score / cap)` (Gemma 2, 2024).
      sinks: [H], a score a head that takes part in the softmax and has no value (Xiao et al., 2023; gpt-oss, 2025).
      positions, kv_positions: [B, T] and [B, S], by which a window counts instead of by the keys' indices: those of a
        cache that holds padding between a document's tokens. They need segment_ids, and no tile is left out for them.
      implementation: None picks for the platform and the shapes: 'one_query' (T = 1, as in decoding); 'tokamax' (that
        library's flash attention, of a sequence to itself, bfloat16, heads of 64 or 128) on NVIDIA GPUs of compute
        capability 9.x that have verified it; 'cudnn' (cuDNN's, the same without segment_ids, heads of up to 128, on
        Hopper 256) on those of 8.0 or newer that have; 'blockwise' (memory linear in T and S, both ways) elsewhere.
        'reference' is dense.
      block_size: queries and keys a tile of 'blockwise'; None for what suits the platform, up to 1024 on GPUs and 256
        elsewhere.

    Returns:
      [B, T, H, d] in q's type.

    Raises:
      ValueError: a shape that does not fit, naming the argument, an implementation that does not exist, or one that
        cannot run here.
    """
    own_segments = kv_segment_ids is not None
    segment_ids, kv_segment_ids = _segments(sizes(attention, locals(), WORDS), segment_ids, kv_segment_ids)
    if block_size is not None and block_size < 1:
        raise ValueError(f'attention: block_size must be at least 1, got {block_size}')
    if window is not None and window < 1:
        raise ValueError(f'attention: window must be at least 1, got {window}')
    if (positions is None) != (kv_positions is None) or (positions is not None and segment_ids is None):
        raise ValueError('attention: positions, kv_positions and segment_ids belong together')
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = None if window is None or window >= k.shape[1] else window  # which then holds all keys
    places = None if window is None or positions is None or kv_positions is None else (positions, kv_positions)
    more = reference.More(window, logit_cap or None, sinks, places)
    arguments = q, k, v, segment_ids, kv_segment_ids, q_offset, scale
    packed, cached = segment_ids is not None, tokamax.cached(q, k, own_segments, q_offset)
    candidates = (
        Candidate('one_query', lambda: one_query.attention(*arguments, more), lambda: _several_queries(q)),
        Candidate(
            'tokamax',
            lambda: tokamax.attention(q, k, v, segment_ids, scale),
            lambda: _extended(more) or tokamax.unsupported(q, k, v, own_segments, q_offset),
            lambda: tokamax.variants(q.shape[-1], packed),
            silent=cached,
        ),
        Candidate(
            'cudnn',
            lambda: cudnn.attention(q, k, v, scale),
            lambda: _extended(more) or cudnn.unsupported(q, k, v, packed, cached),
            lambda: cudnn.variants(q.shape[-1]),
            silent=packed or cached,
        ),
        Candidate('blockwise', lambda: xla.attention(*arguments, block_size, more)),
        Candidate('reference', lambda: reference.attention(*arguments, more), by_name=True),
    )
    return choose('attention', implementation, candidates).run()


def _extended(more: reference.More) -> str | None:
    return None if all(option is None for option in more) else 'it has no window, no cap of scores and no sinks'


def _several_queries(q: Float[Array, 'b t h d']) -> str | None:
    return None if q.shape[1] == 1 else f"'one_query' takes one query a row, q has shape {tuple(q.shape)}"


def _segments(found, segment_ids, kv_segment_ids):
    """The documents of queries and keys, given the sizes of the call."""
    if not found['k'] or found['h'] % found['k']:
        raise ValueError(f'attention: k has {found["k"]} heads, expected a divisor of the {found["h"]} query heads')
    if segment_ids is None:
        if kv_segment_ids is not None:
            raise ValueError('attention: kv_segment_ids is given without segment_ids')
        return None, None
    if kv_segment_ids is None:
        if found['s'] != found['t']:
            raise ValueError(
                f'attention: kv_segment_ids is needed, as there are {found["s"]} keys and {found["t"]} queries'
            )
        kv_segment_ids = segment_ids
    return segment_ids.astype(jnp.int32), kv_segment_ids.astype(jnp.int32)
