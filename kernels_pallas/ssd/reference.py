"""The definition of `ssd`: one `lax.scan` step a token, the oracle of the tests (in float64 there)."""

import jax
import jax.numpy as jnp
from jax import lax


def scan(
    x: jax.Array,
    log_decay: jax.Array,
    B: jax.Array,
    C: jax.Array,
    step: jax.Array | None,
    reset: jax.Array | None,
    initial_state: jax.Array,
    exclusive: bool,
) -> tuple[jax.Array, jax.Array]:
    """Output and final state of `api.ssd`; shapes as there, everything computed in the type of initial_state."""
    heads, wide = x.shape[2], initial_state.dtype
    x, B, C = (value.astype(wide) for value in (x, B, C))
    B, C = (jnp.repeat(value, heads // value.shape[2], axis=2) for value in (B, C))
    x = x if step is None else x * step[..., None]
    decay = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    if reset is None:
        reset = jnp.zeros(x.shape[:2], bool)

    def one(state, token):
        x, decay, B, C, reset = token
        before = jnp.where(reset[:, None, None, None], 0, state)
        state = before * decay[:, :, None, :] + x[..., None] * B[:, :, None, :]
        return state, jnp.einsum('bhpn,bhn->bhp', before if exclusive else state, C, precision='highest')

    final, y = lax.scan(one, initial_state, [jnp.moveaxis(value, 1, 0) for value in (x, decay, B, C, reset)])
    return jnp.moveaxis(y, 0, 1), final
