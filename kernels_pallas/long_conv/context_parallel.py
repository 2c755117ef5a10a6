"""The long convolution of a sequence that a mesh axis shares out, and how a mesh may split the call."""

import jax

from kernels_pallas import exchange
from kernels_pallas.call import Call, bind
from kernels_pallas.long_conv import api


def long_conv(*args, axis_name: str = exchange.AXIS, **kwargs) -> tuple[jax.Array, None]:
    """`kernels_pallas.long_conv` for this shard's tokens, which gets the K - 1 tokens before them from other shards.

    Args:
      args, kwargs: those of `long_conv`; x, positions and mask are this shard's tokens, and there is no state before
        the sequence.
      axis_name: the mesh axis that shares out the sequence.

    Returns:
      `(y of this shard's tokens, None)`: only what continues a sequence has a use for its last tokens.

    Raises:
      ValueError: there is an initial_state.
    """
    call = bind(api.long_conv, *args, **kwargs)
    if call['initial_state'] is not None:
        raise ValueError('long_conv: on a slice of the sequence, give no initial_state')
    past = exchange.previous(call['x'], call['weight'].shape[0] - 1, axis_name)
    return api.long_conv(**call | {'initial_state': past, 'mask': None})[0], None


CALL = Call(
    api.long_conv,
    results=lambda _: ('b t c', 'b l c'),
    axes={'b': 'batch', 't': 'sequence', 'c': 'inner'},
    context_parallel=long_conv,
    whole=lambda arguments: ('t',) if arguments['initial_state'] is not None else (),  # it must go out again
)
