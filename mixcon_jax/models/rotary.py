"""Rotary positions: what attention and retention turn queries and keys by."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixcon_jax.models.layers import widened


def rotate(
    x: Float[Array, 'b t h p'], positions: Int[Array, 'b t'], theta: float, width: int = 0
) -> Float[Array, 'b t h p']:
    """Rotary position embedding (Su et al., 2021), the two halves of a head's first ``width`` channels rotated
    against each other; 0 means all. Angles and products are in at least float32, rounded to x's dtype.
    """
    half = (width or x.shape[-1]) // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b, rest = widened(x[..., :half]), widened(x[..., half : 2 * half]), x[..., 2 * half :]
    turned = (a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)
    return jnp.concatenate([*turned, rest], axis=-1)
