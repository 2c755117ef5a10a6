"""`long_conv` of a sequence that a mesh axis shares out, and how a mesh may split the call."""

import jax
from jax import lax

from kernels_pallas import exchange
from kernels_pallas.call import Call, bind
from kernels_pallas.long_conv import api


def long_conv(*args, axis_name: str = exchange.AXIS, **kwargs) -> tuple[jax.Array, None]:
    """`kernels_pallas.long_conv` for this shard's tokens, whose channels are exchanged for the whole sequence.

    Every token reads all before it, but no channel another: a shard computes the whole sequence of its part of the
    channels. It sends and gets what it holds, twice.

    Args:
      args, kwargs: those of `long_conv`; v, positions and mask are this shard's tokens, T of them on every shard; there
        is no state before the sequence. The number of shards divides the channels.
      axis_name: the mesh axis that shares out the sequence.

    Returns:
      `(y of this shard's tokens, None)`.

    Raises:
      ValueError: there is an initial_state, or the channels cannot be shared out.
    """
    call = bind(api.long_conv, *args, **kwargs)
    shards, channels = lax.axis_size(axis_name), call['v'].shape[2]
    if call['initial_state'] is not None:
        raise ValueError('long_conv: on a slice of the sequence, give no initial_state')
    if channels % shards:
        raise ValueError(f'long_conv: {shards} devices share out the sequence, which must divide {channels} channels')
    part = channels // shards
    mine = lambda x: lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * part, part, x.ndim - 1)
    call['v'] = lax.all_to_all(call['v'], axis_name, 2, 1, tiled=True)
    call |= {name: mine(call[name]) for name in ('taps', 'skip') if call[name] is not None}
    for name in ('positions', 'mask'):
        if call[name] is not None:
            call[name] = lax.all_gather(call[name], axis_name, axis=1, tiled=True)
    y, _ = api.long_conv(**call)
    return lax.all_to_all(y, axis_name, 1, 2, tiled=True), None


CALL = Call(
    api.long_conv,
    results=lambda _: ('b t d', 'b p d'),
    axes={'b': 'batch', 't': 'sequence', 'd': 'inner'},
    context_parallel=long_conv,
    # A state that comes in must go out again: no part of the sequence has all of it.
    whole=lambda arguments: () if arguments['initial_state'] is None else ('t',),
)
