"""`delta_rule`, one token after another: what the chunked form is tested against (in float64 there)."""

import jax
import jax.numpy as jnp
from jax import lax


def scan(
    x: jax.Array,
    log_decay: jax.Array,
    B: jax.Array,
    C: jax.Array,
    removed: jax.Array,
    rewritten: jax.Array,
    reset: jax.Array | None,
    initial_state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Output and final state of `api.delta_rule`; shapes as there, all of one type."""
    if reset is None:
        reset = jnp.zeros(x.shape[:2], bool)

    def one(state, token):
        x, log_decay, B, C, removed, rewritten, reset = token
        state = jnp.where(reset[:, None, None, None], 0, state)
        gone = jnp.einsum('bhpn,bhn->bhp', state, removed, precision='highest')
        state = state * jnp.exp(log_decay)[:, :, None] + x[..., None] * B[:, :, None]
        state = state - gone[..., None] * rewritten[:, :, None]
        return state, jnp.einsum('bhpn,bhn->bhp', state, C, precision='highest')

    tokens = [jnp.moveaxis(value, 1, 0) for value in (x, log_decay, B, C, removed, rewritten, reset)]
    final, y = lax.scan(one, initial_state, tokens)
    return jnp.moveaxis(y, 0, 1), final
