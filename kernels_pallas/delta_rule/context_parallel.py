"""`delta_rule` of a sequence that a mesh axis shares out, and how a mesh may split the call."""

import jax.numpy as jnp

from kernels_pallas import exchange
from kernels_pallas.call import Call, bind
from kernels_pallas.delta_rule import api


def delta_rule(*args, axis_name: str = exchange.AXIS, exchange_by: str | None = None, **kwargs) -> tuple:
    """`kernels_pallas.delta_rule` of the whole sequence, whose slice this shard holds.

    A slice's map is `S -> S M + S_local`. M [N, N] is what the slice makes of the identity with values of 0: N more
    rows of the same call, zero when a document starts in it.

    Args:
      args, kwargs: those of `delta_rule`; what has a time is this shard's tokens, T of them on every shard;
        initial_state is the state before the whole sequence, the same on every shard.
      axis_name: the mesh axis that shares out the sequence.
      exchange_by: `method` of `exchange.entering_state`.

    Returns:
      As `delta_rule`: y is that of this shard's tokens, the final state that of the whole sequence, on every shard.
    """
    call = bind(api.delta_rule, *args, **kwargs)
    initial, x = call.pop('initial_state'), call['x']
    (batch, _, heads, values), keys = x.shape, call['B'].shape[-1]
    rows = jnp.concatenate([jnp.zeros((values, keys), x.dtype), jnp.eye(keys, dtype=x.dtype)])
    more = jnp.concatenate([x, jnp.zeros((*x.shape[:3], keys), x.dtype)], -1)
    start = jnp.broadcast_to(rows, (batch, heads, values + keys, keys))
    _, both = api.delta_rule(**call | {'x': more}, initial_state=start)
    apply = lambda first, second: jnp.einsum('bhpn,bhnm->bhpm', first, second, precision='highest')
    entering = exchange.entering_state(
        both[:, :, values:],
        both[:, :, :values],
        jnp.zeros_like(both[:, :, :values]) if initial is None else initial.astype(both.dtype),
        act=lambda linear, state: apply(state, linear),
        compose=apply,
        axis_name=axis_name,
        method=exchange_by,
    )
    y, final = api.delta_rule(**call, initial_state=entering)
    return y, exchange.of_last_shard(final, axis_name)


CALL = Call(
    api.delta_rule,
    results=lambda _: ('b t h p', 'b h p n'),
    axes={'b': 'batch', 't': 'sequence', 'h': 'heads'},
    context_parallel=delta_rule,
)
