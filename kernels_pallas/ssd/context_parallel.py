"""`ssd` of a sequence that a mesh axis shares out, and how a mesh may split the call."""

import jax.numpy as jnp

from kernels_pallas import exchange
from kernels_pallas.call import Call, bind
from kernels_pallas.ssd import api


def ssd(*args, axis_name: str = exchange.AXIS, exchange_by: str | None = None, **kwargs) -> tuple:
    """`kernels_pallas.ssd` of the whole sequence, whose slice this shard holds.

    A slice's map is `S -> S diag(exp(sum log_decay)) + S_local`, with zero for the decay when a document starts in it.

    Args:
      args, kwargs: those of `ssd`; what has a time is this shard's tokens, T of them on every shard; initial_state is
        the state before the whole sequence, the same on every shard.
      axis_name: the mesh axis that shares out the sequence.
      exchange_by: `method` of `exchange.entering_state`.

    Returns:
      As `ssd`: y is that of this shard's tokens, the final state that of the whole sequence, on every shard.
    """
    call = bind(api.ssd, *args, **kwargs)
    initial = call.pop('initial_state')
    _, local = api.ssd(**call)
    total = jnp.sum(call['log_decay'].astype(local.dtype), 1)
    linear = jnp.exp(total)[..., None, None] if total.ndim == 2 else jnp.exp(total)[..., None, :]
    if call['reset'] is not None:
        linear = jnp.where(jnp.any(call['reset'], 1)[:, None, None, None], 0, linear)
    entering = exchange.entering_state(
        linear,
        local,
        jnp.zeros_like(local) if initial is None else initial.astype(local.dtype),
        act=jnp.multiply,
        compose=jnp.multiply,
        axis_name=axis_name,
        method=exchange_by,
    )
    y, final = api.ssd(**call, initial_state=entering)
    return y, exchange.of_last_shard(final, axis_name)


CALL = Call(
    api.ssd,
    results=lambda _: ('b t h p', 'b h p n'),
    axes={'b': 'batch', 't': 'sequence', 'h': 'heads', 'g': 'heads'},
    context_parallel=ssd,
    whole=lambda arguments: ('g',) if arguments['B'].shape[2] == 1 else (),  # every head reads the one group
)
