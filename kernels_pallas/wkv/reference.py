"""The definition of `wkv`, one step a token: the oracle of the tests (in float64 there)."""

import jax
import jax.numpy as jnp
from jax import lax

# Of a token and channel, forward: its exponentials, and with them the joins of two sums with the token, once for the
# output and once for the state.
EXPONENTIALS, OPERATIONS = 4, 16
EMPTY = -1e30  # the exponent of a sum of nothing; finite, so that no difference of two is nan
State = tuple[jax.Array, jax.Array, jax.Array]  # numerator, denominator and exponent, [B, D] each


def nothing(shape: tuple[int, ...], dtype) -> State:
    """The state before the first token."""
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full(shape, EMPTY, dtype)


def joined(state: State, log_decay: jax.Array, later: State) -> State:
    """Sums that have decayed and those that came since, over the larger exponent, which no gradient passes."""
    past = state[2] + log_decay
    highest = lax.stop_gradient(jnp.maximum(past, later[2]))
    a, b = jnp.exp(past - highest), jnp.exp(later[2] - highest)
    return state[0] * a + later[0] * b, state[1] * a + later[1] * b, highest


def of_token(k: jax.Array, v: jax.Array) -> State:
    """One token's own sums."""
    exponent = lax.stop_gradient(k)
    weight = jnp.exp(k - exponent)
    return weight * v, weight, exponent


def chosen(where: jax.Array, one: State, other: State) -> State:
    """One state where that is True, else the other."""
    return jnp.where(where, one[0], other[0]), jnp.where(where, one[1], other[1]), jnp.where(where, one[2], other[2])


def step(state: State, k, v, decay, bonus, reset, mask) -> tuple[State, jax.Array]:
    """The state after a token and its output; k, v [B, D], reset and mask [B] or None."""
    if reset is not None:
        state = chosen(reset[:, None], nothing(k.shape, k.dtype), state)
    numerator, denominator, _ = joined(state, jnp.zeros_like(decay), of_token(k + bonus, v))
    after = joined(state, -decay, of_token(k, v))
    if mask is not None:
        after = chosen(mask[:, None], after, state)
    return after, numerator / denominator


def scan(k, v, decay, bonus, reset, mask, state):
    """Output and final state of `api.wkv`, all in one type; state is a `State`."""

    def one(state, token):
        return step(state, token['k'], token['v'], decay, bonus, token.get('reset'), token.get('mask'))

    tokens = {'k': k, 'v': v} | {name: x for name, x in (('reset', reset), ('mask', mask)) if x is not None}
    final, y = lax.scan(one, state, {name: jnp.moveaxis(x, 1, 0) for name, x in tokens.items()})
    return jnp.moveaxis(y, 0, 1), final
