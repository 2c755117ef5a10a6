"""The definition of `modal_conv`, one step a token: the oracle of the tests (in float64 there).

Complex numbers are pairs of real arrays, [2, ...]: not every backend and collective takes complex ones.
"""

import jax
import jax.numpy as jnp
from jax import lax


def poles(rate: jax.Array, angle: jax.Array) -> jax.Array:
    """exp(-rate + i angle) [2, S, D]."""
    return jnp.exp(-rate) * jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of complex numbers [2, ...], which broadcast."""
    return jnp.stack([a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]])


def read(residue: jax.Array, states: jax.Array) -> jax.Array:
    """Re sum_n R_n s_n: residue [2, S, D], states [2, S, ..., D], the same axes between for both."""
    return jnp.sum(residue[0] * states[0] - residue[1] * states[1], 0)


def scan(v, poles, residue, reset, mask, state):
    """Output and final state of `api.modal_conv`, all in one type, without skip; the state is [B, 2, S, D]."""
    turned, weights = poles[:, :, None], residue[:, :, None]

    def one(state, token):  # state [2, S, B, D], its tokens [B, D]
        before = state if reset is None else jnp.where(token['reset'][:, None], 0, state)
        after = times(turned, before)
        after = jnp.stack([after[0] + token['v'], after[1]])
        if mask is not None:
            after = jnp.where(token['mask'][:, None], after, state)
        return after, read(weights, after)

    tokens = {name: x for name, x in (('v', v), ('reset', reset), ('mask', mask)) if x is not None}
    final, y = lax.scan(one, jnp.moveaxis(state, 0, 2), {name: jnp.moveaxis(x, 1, 0) for name, x in tokens.items()})
    return jnp.moveaxis(y, 0, 1), jnp.moveaxis(final, 2, 0)
