"""`wkv` of a sequence that a mesh axis shares out, and how a mesh may split the call."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import exchange
from kernels_pallas.call import Call, bind
from kernels_pallas.wkv import api
from kernels_pallas.wkv.reference import EMPTY, joined, nothing


def wkv(*args, axis_name: str = exchange.AXIS, **kwargs) -> tuple:
    """`kernels_pallas.wkv` of the whole sequence, whose slice this shard holds.

    Every shard gathers what each slice decays by and adds, four numbers a channel, and joins those before its own.

    Args:
      args, kwargs: those of `wkv`; what has a time is this shard's tokens, T of them on every shard; initial_state is
        the state before the whole sequence, the same on every shard.
      axis_name: the mesh axis that shares out the sequence.

    Returns:
      As `wkv`: y is that of this shard's tokens, the final state that of the whole sequence, on every shard.
    """
    call = bind(api.wkv, *args, **kwargs)
    initial = call.pop('initial_state')
    _, local = api.wkv(**call)
    batch, length, width = call['k'].shape
    real = length if call['mask'] is None else jnp.sum(call['mask'], 1)[:, None]
    log_decay = jnp.broadcast_to(-call['decay'].astype(local.dtype) * real, (batch, width))
    if (anew := exchange.begins_anew(call)) is not None:
        log_decay = jnp.where(anew[:, None], EMPTY, log_decay)
    decays, states = (lax.all_gather(x, axis_name) for x in (log_decay, local))
    by_part = lambda x: (x[:, 0], x[:, 1], jax.lax.stop_gradient(x[:, 2]))
    if initial is None:
        entering = [nothing((batch, width), local.dtype)]
    else:
        entering = [by_part(initial.astype(local.dtype))]
    for i in range(lax.axis_size(axis_name) - 1):
        entering.append(joined(entering[-1], decays[i], by_part(states[i])))
    every = jnp.stack([jnp.stack(state, 1) for state in entering])
    mine = lax.dynamic_index_in_dim(every, lax.axis_index(axis_name), 0, keepdims=False)
    y, final = api.wkv(**call, initial_state=mine)
    return y, exchange.of_last_shard(final, axis_name)


CALL = Call(
    api.wkv,
    results=lambda _: ('b t d', 'b three d'),
    axes={'b': 'batch', 't': 'sequence', 'd': 'inner'},
    context_parallel=wkv,
)
