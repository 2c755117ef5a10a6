"""The adaptive gains of a sequence that a mesh axis shares out, and how a mesh may split the calls."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import exchange
from kernels_pallas.adaptive_gain import api
from kernels_pallas.call import Call, bind


def matrix_gain(*args, axis_name: str = exchange.AXIS, exchange_by: str | None = None, **kwargs) -> tuple:
    """`kernels_pallas.adaptive_gain.matrix_gain` of the whole sequence, whose slice this shard holds.

    A slice's map is `K -> K M + N`, P x P per head, M being the product of its tokens' `lam (I - alpha phi phi^T)`.

    Args:
      args, kwargs: those of `matrix_gain`. e, alpha, log_decay and reset are this shard's tokens, initial_gain is the
        gain before the whole sequence, the same on every shard.
      axis_name, exchange_by: as in `selective_scan`.

    Returns:
      `(K e of this shard's tokens, final gain of the whole sequence, on every shard)`.
    """
    unit = lambda e: jnp.broadcast_to(jnp.eye(e.shape[3]), (e.shape[0], e.shape[2], e.shape[3], e.shape[3]))
    return _gain(api.matrix_gain, args, kwargs, unit, jnp.matmul, axis_name, exchange_by)


def diagonal_gain(*args, axis_name: str = exchange.AXIS, exchange_by: str | None = None, **kwargs) -> tuple:
    """`kernels_pallas.adaptive_gain.diagonal_gain` in the same way, its maps elementwise and its gains [B, H, P]."""
    unit = lambda e: jnp.ones((e.shape[0], *e.shape[2:]))
    return _gain(api.diagonal_gain, args, kwargs, unit, jnp.multiply, axis_name, exchange_by)


def _gain(
    gain: Callable[..., tuple],
    args: tuple,
    kwargs: dict,
    unit: Callable[[jax.Array], jax.Array],
    product: Callable[[jax.Array, jax.Array], jax.Array],
    axis_name: str,
    exchange_by: str | None,
) -> tuple:
    """Runs a gain whose maps compose, and act on gains from the right, by `product`; `unit` is the identity map."""
    call = bind(gain, *args, **kwargs)
    run = lambda initial: gain(**(call | {'initial_gain': initial}))
    identity = unit(call['e'])
    # From two gains at once: what the slice does to the one it does to their difference, less what it writes.
    local, carried = jax.vmap(lambda initial: run(initial)[1])(jnp.stack([jnp.zeros_like(identity), identity]))
    initial = call['initial_gain']
    entering = exchange.entering_state(
        carried - local,
        local,
        jnp.zeros_like(local) if initial is None else initial.astype(local.dtype),
        act=lambda linear, state: product(state, linear),
        compose=product,
        axis_name=axis_name,
        method=exchange_by,
    )
    out, final = run(entering)
    return out, exchange.of_last_shard(final, axis_name)


AXES = {'b': 'batch', 't': 'sequence', 'h': 'heads'}
MATRIX = Call(api.matrix_gain, lambda _: ('b t h p', 'b h p p'), AXES, matrix_gain)
DIAGONAL = Call(api.diagonal_gain, lambda _: ('b t h p', 'b h p'), AXES, diagonal_gain)
