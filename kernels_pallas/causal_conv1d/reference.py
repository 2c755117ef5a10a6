"""The definition of the causal convolution: one `lax.scan` step a token, the oracle of the tests."""

import jax
import jax.numpy as jnp
from jax import lax


def conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    lags: tuple[int, ...],
    silu: bool,
    residual: bool,
    reach: jax.Array,
    past: jax.Array,
) -> jax.Array:
    """Output of `api.causal_conv1d`, all arrays in one type: x [B, T, C], weight [K, C], bias [C], past [B, L, C].

    reach [B, T] is how many tokens back a token may read.
    """

    def step(window, token):  # window [B, L, C]: the tokens before this one, the newest last
        x, reach = token
        window = jnp.concatenate([window, x[:, None]], 1)
        y = jnp.broadcast_to(bias, x.shape)
        for lag, w in zip(lags, weight, strict=True):
            y = y + jnp.where((reach >= lag)[:, None], window[:, -1 - lag] * w, 0)
        y = y * jax.nn.sigmoid(y) if silu else y
        return window[:, 1:], x + y if residual else y

    _, y = lax.scan(step, past, (jnp.moveaxis(x, 1, 0), jnp.moveaxis(reach, 1, 0)))
    return jnp.moveaxis(y, 0, 1)
