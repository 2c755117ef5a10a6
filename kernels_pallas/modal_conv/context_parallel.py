"""`modal_conv` of a sequence that a mesh axis shares out, and how a mesh may split the call."""

import jax.numpy as jnp

from kernels_pallas import exchange
from kernels_pallas.call import Call, bind
from kernels_pallas.modal_conv import api
from kernels_pallas.modal_conv.reference import poles, times


def modal_conv(*args, axis_name: str = exchange.AXIS, **kwargs) -> tuple:
    """`kernels_pallas.modal_conv` of the whole sequence, whose slice this shard holds.

    A slice's map turns and damps each state by as many tokens as it has, by nothing if a document starts in it, and
    adds the state that it reaches from zero.

    Args:
      args, kwargs: those of `modal_conv`; what has a time is this shard's tokens, T of them on every shard;
        initial_state is the state before the whole sequence, the same on every shard.
      axis_name: the mesh axis that shares out the sequence.

    Returns:
      As `modal_conv`: y is that of this shard's tokens, the final state that of the whole sequence, on every shard.
    """
    call = bind(api.modal_conv, *args, **kwargs)
    initial = call.pop('initial_state')
    _, local = api.modal_conv(**call)
    batch, length, _ = call['v'].shape
    real = jnp.full(batch, length) if call['mask'] is None else jnp.sum(call['mask'], 1)
    real = real.astype(local.dtype)[:, None, None]
    linear = jnp.moveaxis(
        poles(call['rate'].astype(local.dtype) * real, call['angle'].astype(local.dtype) * real), 0, 1
    )
    if (anew := exchange.begins_anew(call)) is not None:
        linear = jnp.where(anew[:, None, None, None], 0, linear)
    product = lambda a, b: jnp.moveaxis(times(jnp.moveaxis(a, 1, 0), jnp.moveaxis(b, 1, 0)), 0, 1)
    entering = exchange.entering_state(
        linear,
        local,
        jnp.zeros_like(local) if initial is None else initial.astype(local.dtype),
        act=product,
        compose=product,
        axis_name=axis_name,
    )
    y, final = api.modal_conv(**call, initial_state=entering)
    return y, exchange.of_last_shard(final, axis_name)


CALL = Call(
    api.modal_conv,
    results=lambda _: ('b t d', 'b two s d'),
    axes={'b': 'batch', 't': 'sequence', 'd': 'inner'},
    context_parallel=modal_conv,
)
