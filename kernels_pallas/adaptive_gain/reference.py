"""Sequential adaptive gains: one `lax.scan` step a token, the oracle of the chunked forms."""

import jax
import jax.numpy as jnp
from jax import lax

EPS = 1e-6


def error_share(e: jax.Array) -> jax.Array:
    """Share of a channel in its head's squared error, `min(1, e^2 / mean e^2)`, for e [..., P]."""
    square = e * e
    return jnp.minimum(1, square / (jnp.mean(square, -1, keepdims=True) + EPS))


def _by_time(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.moveaxis(x, 1, 0) for x in arrays)


def matrix(
    e: jax.Array, phi: jax.Array, alpha: jax.Array, log_decay: jax.Array, reset: jax.Array, initial_gain: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`out_k = K_k e_k`, then `K_{k+1} = lam K_k (I - alpha phi phi^T) + alpha phi phi^T`.

    e, phi [B, T, H, P]; alpha, log_decay [B, T, H]; reset bool [B, T]; gain [B, H, P, P].
    """

    def step(K, token):
        e, phi, alpha, log_decay, reset = token
        K = jnp.where(reset[:, None, None, None], 0, K)
        out = jnp.einsum('bhij,bhj->bhi', K, e)
        write = alpha[..., None, None] * phi[..., :, None] * phi[..., None, :]
        return jnp.exp(log_decay)[..., None, None] * (K - K @ write) + write, out

    K, out = lax.scan(step, initial_gain, _by_time(e, phi, alpha, log_decay, reset))
    return jnp.moveaxis(out, 0, 1), K


def diagonal(
    e: jax.Array, alpha: jax.Array, log_decay: jax.Array, reset: jax.Array, initial_gain: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`out_k = K_k * e_k`, then `K_{k+1} = lam (K_k (1 - alpha n) + alpha n)`, n the error's share; gain [B, H, P]."""

    def step(K, token):
        e, alpha, log_decay, reset = token
        K = jnp.where(reset[:, None, None], 0, K)
        rate = alpha[..., None] * error_share(e)
        return jnp.exp(log_decay)[..., None] * (K * (1 - rate) + rate), K * e

    K, out = lax.scan(step, initial_gain, _by_time(e, alpha, log_decay, reset))
    return jnp.moveaxis(out, 0, 1), K
