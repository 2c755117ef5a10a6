"""Attention by cuDNN's flash attention, through `jax.nn.dot_product_attention`: rows of one document.

cuDNN knows the causal mask; documents side by side in a row would need a mask of T x T, which is refused. XLA splits it
over rows and heads by itself, and inside `jax.shard_map` there is nothing to split.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import platform

OLDEST = (8, 0)  # compute capability
WIDEST = {8: 128}  # heads, by major compute capability, as JAX checks it
WIDEST_ELSEWHERE = 256
NARROW = 128  # up to here one card holds, beyond it another
MULTIPLE = 8
MOST = 2**31  # numbers of an array that indices of 32 bits can count


def unsupported(q: Any, k: Any, v: Any, packed: bool, cached: bool) -> str | None:
    """Why this cannot take a call on the device that is here, or None.

    Args:
      q, k, v: as in `api.attention`, or their shapes and types.
      packed: whether there are segment_ids.
      cached: whether the call is another than that of a sequence to itself from its start.
    """
    if cached:
        return 'it takes a sequence that attends to itself from its start, without kv_segment_ids or a q_offset'
    if packed:
        return 'it takes rows of one document, without segment_ids'
    for name, value in (('q', q), ('k', k), ('v', v)):
        if value.dtype != jnp.bfloat16:  # float16 has no cases
            return f'it takes bfloat16, {name} is {value.dtype.name}'
    capability = platform.compute_capability()
    if capability is None:
        return 'it needs an NVIDIA GPU'
    if capability < OLDEST:
        return f'it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}'
    width, widest = q.shape[-1], WIDEST.get(capability[0], WIDEST_ELSEWHERE)
    if width > widest or width % MULTIPLE:
        return f'it takes heads of a multiple of {MULTIPLE} up to {widest}, these have {width}'
    if q.shape[1] % 2:
        return f'it takes an even number of tokens, these are {q.shape[1]}'
    if q.size >= MOST:
        return f'q has {q.size} numbers, which indices of 32 bits cannot count'
    return _missing()


def _missing() -> str | None:
    """Why cuDNN cannot be called, or None."""
    try:
        from jax._src.lib import cuda_versions  # where JAX itself looks for it

        return None if cuda_versions.cudnn_get_version() else 'cuDNN is not installed'
    except Exception as error:  # no CUDA plugin, no cuDNN, or another JAX
        return f'cuDNN cannot be found: {error}'


def variants(width: int) -> tuple[str, ...]:
    """The programs that a call with heads of a width runs, by the names of their cards."""
    return ('cudnn' if width <= NARROW else 'cudnn_wide',)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Shapes and result as in `api.attention`, for a sequence of one document that attends to itself.

    Args:
      q, k, v: [B, T, H, d], [B, T, K, d], bfloat16.
      scale: of the scores.
    """
    return _library(q, k, v, is_causal=True, scale=scale, implementation='cudnn')


_library = jax.nn.dot_product_attention  # tests put its XLA form in place
