"""Attention by tokamax's flash attention for Hopper GPUs (Pallas Mosaic): an adapter to its private interface.

What a query sees reaches from its document's first token to itself: of tokamax's masks that is `is_causal` with
`k_start`, by which its forward pass leaves out the tiles before. Its backward pass would visit them, masked; in its
place stands our own (`mosaic_gpu.py`). To be called on a device's own part, inside `jax.shard_map(...,
check_vma=False)`: left to XLA, its inputs are gathered first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import tokamax as library
from kernels_pallas.attention import mosaic_gpu
from kernels_pallas.call import KEPT

MODULE = 'tokamax._src.ops.attention.pallas_mosaic_gpu'
WIDTHS = (64, 128)  # of heads, that cases try
TILE = 128  # of queries and keys; the library's own padding is not asked for
TILES = {'block_q': 64, 'block_kv': 128, 'num_stages': 2}  # of the forward pass: what the library takes by itself


def cached(q: Any, k: Any, own_segments: bool, q_offset: Any) -> bool:
    """Whether a call is another than that of a sequence to itself from its start: one that reads a cache, say."""
    return own_segments or k.shape[1] != q.shape[1] or not isinstance(q_offset, int) or q_offset != 0


def unsupported(q: Any, k: Any, v: Any, own_segments: bool, q_offset: Any) -> str | None:
    """Why this cannot take a call on the device that is here, or None.

    Args:
      q, k, v: as in `api.attention`, or their shapes and types.
      own_segments: whether keys have segment_ids of their own.
      q_offset: as in `api.attention`.
    """
    if cached(q, k, own_segments, q_offset):
        return 'it takes a sequence that attends to itself from its start, without kv_segment_ids or a q_offset'
    for name, value in (('q', q), ('k', k), ('v', v)):
        if value.dtype != jnp.bfloat16:
            return f'it takes bfloat16, {name} is {value.dtype.name}'
    if q.shape[-1] not in WIDTHS:
        return f'it takes heads of width {" or ".join(map(str, WIDTHS))}, these have {q.shape[-1]}'
    batch, length, *others = q.shape
    return library.too_many('q', (batch, padded(length), *others)) or library.unavailable(MODULE)


def padded(length: int) -> int:
    """A length as the library is given it: of whole tiles."""
    return length + -length % TILE


def variants(width: int, packed: bool) -> tuple[str, ...]:
    """The programs that a call with heads of a width runs, by the names of their cards."""
    return (f'{"packed" if packed else "causal"}{width}',)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float) -> jax.Array:
    """Shapes and result as in `api.attention`, for a sequence that attends to itself.

    Args:
      q, k, v: [B, T, H, d], [B, T, K, d], bfloat16, any T.
      segment_ids: int [B, T] or None; a document's tokens must lie side by side.
      scale: of the scores.
    """
    length = q.shape[1]
    behind = (0, padded(length) - length)  # all, and seen by none
    pad = lambda x: jnp.pad(x, ((0, 0), behind) + ((0, 0),) * (x.ndim - 2))
    start = None if segment_ids is None else first_keys(pad(segment_ids))
    out = _flash(pad(q), pad(k), pad(v), start, scale)[:, :length]
    # Padding has seen itself, so that no row is without a key: its output and what flows back from it are cut off here.
    return out if segment_ids is None else jnp.where((segment_ids > 0)[..., None, None], out, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | None, scale: float) -> jax.Array:
    """The library's forward pass, and our gradient.

    Args:
      q, k, v: as in `attention`, T a multiple of `TILE`.
      start: int32 [B, T], the first key that each query sees.
      scale: of the scores.
    """
    return _forward(q, k, v, start, scale)[0]


def _flash_forward(q, k, v, start, scale):
    out, logsumexp = (checkpoint_name(x, KEPT) for x in _forward(q, k, v, start, scale))
    return out, (q, k, v, start, out, logsumexp)


def _flash_backward(scale, kept, dout):
    q, k, v, start, out, logsumexp = kept
    return *_backward(q, k, v, out, dout, logsumexp, start, scale), None


_flash.defvjp(_flash_forward, _flash_backward)
_backward = mosaic_gpu.backward


def _forward(q, k, v, start, scale) -> tuple[jax.Array, jax.Array]:
    """The output and the logsumexp [B, H, T] of each query, by the library's kernel.

    Its tiles are written down, since its own choice looks into a file of timings first.
    """
    from tokamax._src.ops.attention import base
    from tokamax._src.ops.attention import pallas_mosaic_gpu as forward

    flash = forward.PallasMosaicGpuFlashAttention(config=forward.ConfigSM90(**TILES))
    mask = base.Mask(is_causal=True, k_start=None if start is None else start[:, None, :])
    out, (highest, total) = flash(q, k, v, mask=mask, logits_scale=scale, return_residuals=True)
    return out, highest + jnp.log(total)


def first_keys(segment_ids: jax.Array) -> jax.Array:
    """The first key [B, T] that each query sees: where its run of equal ids begins; for padding, itself."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return lax.cummax(jnp.where(begins | (segment_ids <= 0), index, 0), axis=1)
