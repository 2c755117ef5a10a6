"""The causal convolution of a sequence that a mesh axis shares out, and how a mesh may split the call."""

import jax

from kernels_pallas import exchange
from kernels_pallas.call import Call, bind
from kernels_pallas.causal_conv1d import api


def causal_conv1d(*args, axis_name: str = exchange.AXIS, **kwargs) -> tuple[jax.Array, None]:
    """`kernels_pallas.causal_conv1d` for this shard's tokens, which gets the tokens before them from other shards.

    Args:
      args, kwargs: those of `causal_conv1d`; x, positions and mask are this shard's tokens, and there is no state
        before the sequence. Documents are given by positions.
      axis_name: the mesh axis that shares out the sequence.

    Returns:
      `(y of this shard's tokens, None)`: only what continues a sequence has a use for its last tokens.
    """
    call = bind(api.causal_conv1d, *args, **kwargs)
    longest = max(call['lags'] or (call['weight'].shape[0] - 1,))
    call |= {'initial_state': exchange.previous(call['x'], longest, axis_name), 'mask': None}
    return api.causal_conv1d(**call)[0], None


CALL = Call(
    api.causal_conv1d,
    results=lambda _: ('b t c', 'b l c'),
    axes={'b': 'batch', 't': 'sequence', 'c': 'inner'},
    context_parallel=causal_conv1d,
    whole=lambda arguments: () if arguments['initial_state'] is None else ('t',),
)
