"""Sequential selective scan: one `lax.scan` step a token, the oracle of every other implementation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Inputs(NamedTuple):
    """Validated arrays, already in the compute type (float32, or float64 for float64 inputs)."""

    u: jax.Array  # [B, T, D]
    dt: jax.Array  # [B, T, D]; 0 at tokens that must leave the state untouched
    A: jax.Array  # [D, N], negative
    B: jax.Array  # [B, T, N]
    C: jax.Array  # [B, T, N]
    reset: jax.Array | None  # bool [B, T]
    initial_state: jax.Array  # [B, D, N], or [B, 2, D, N] with a delay


class Options(NamedTuple):
    """What the plain recurrence is extended by; None everywhere is the plain S6 scan."""

    Z: jax.Array | None = None  # [N, N]
    g: jax.Array | None = None  # [N]
    F: jax.Array | None = None  # [N, N]
    delay: jax.Array | None = None  # [D]
    noise_key: jax.Array | None = None
    noise_std: jax.Array | None = None  # scalar
    prior: bool = False
    noise_start: jax.Array | int = 0  # index of the call's first token, for the noise


class Outputs(NamedTuple):
    y: jax.Array  # [B, T, D], without the skip
    final_state: jax.Array  # like Inputs.initial_state
    prior: jax.Array | None  # [B, T, D]


def token_noise(options: Options, time: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Process noise [B, D, N] of the call's token at index `time`.

    The key is folded with the token's index in the sequence, so the noise does not depend on how it is cut.
    """
    key = jax.random.fold_in(options.noise_key, options.noise_start + time)
    return options.noise_std * jax.random.normal(key, shape, dtype)


def scan(inputs: Inputs, options: Options) -> Outputs:
    """Evaluates the recurrence token by token, literally as it is written in the README."""
    batch, length, channels = inputs.u.shape
    states = inputs.A.shape[1]
    m = options.delay

    def step(carry, token):
        time, u, dt, B, C, reset = token
        carry = jnp.where(reset.reshape((batch,) + (1,) * (carry.ndim - 1)), 0, carry)
        newest, older = (carry, None) if m is None else (carry[:, 0], carry[:, 1])
        past = newest if m is None else (1 - m[:, None]) * newest + m[:, None] * older
        live = (dt > 0)[..., None]
        carried = jnp.exp(dt[..., None] * inputs.A) * past
        if m is not None:  # without a delay dt = 0 already is the identity
            carried = jnp.where(live, carried, newest)
        x = carried + (dt * u)[..., None] * B[:, None, :]
        if options.noise_key is not None:
            x = x + jnp.where(live, token_noise(options, time, (batch, channels, states), x.dtype), 0)
        seen = x
        if options.Z is not None:
            seen = seen * jax.nn.silu(seen @ options.Z.T + options.g)
        if options.F is not None:
            seen = seen + seen @ options.F.T
        y = jnp.einsum('bdn,bn->bd', seen, C)
        prior = jnp.einsum('bdn,bn->bd', carried, C)
        if m is not None:
            x = jnp.stack([x, jnp.where(live, newest, older)], 1)
        return x, (y, prior)

    reset = jnp.zeros((batch, length), bool) if inputs.reset is None else inputs.reset
    by_time = [jnp.moveaxis(x, 1, 0) for x in (inputs.u, inputs.dt, inputs.B, inputs.C, reset)]
    final_state, (y, prior) = lax.scan(step, inputs.initial_state, (jnp.arange(length), *by_time))
    return Outputs(jnp.moveaxis(y, 0, 1), final_state, jnp.moveaxis(prior, 0, 1) if options.prior else None)
