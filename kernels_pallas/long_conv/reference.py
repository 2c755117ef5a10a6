"""The definition of `long_conv`, one lag after another: O(T^2), the oracle of the tests (in float64 there)."""

import jax
import jax.numpy as jnp
from jax import lax


def conv(v: jax.Array, taps: jax.Array, positions: jax.Array | None, past: jax.Array | None) -> jax.Array:
    """Output of `api.long_conv` [B, T, D], all in one type, without skip."""
    behind = 0 if past is None else past.shape[1]
    values = v if past is None else jnp.concatenate([past, v], 1)
    length = values.shape[1]
    values = jnp.pad(values, ((0, 0), (length, 0), (0, 0)))

    def add(y, lag):
        earlier = lax.dynamic_slice_in_dim(values, length + behind - lag, v.shape[1], 1)
        if positions is not None:
            earlier = jnp.where((positions >= lag)[..., None], earlier, 0)
        return y + taps[lag] * earlier, None

    return lax.scan(add, jnp.zeros_like(v), jnp.arange(min(length, taps.shape[0])))[0]
