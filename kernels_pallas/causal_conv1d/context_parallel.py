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

    Raises:
      ValueError: there is a reset or an initial_state.
    """
    call = bind(api.causal_conv1d, *args, **kwargs)
    if call['reset'] is not None or call['initial_state'] is not None:
        raise ValueError('causal_conv1d: on a slice of the sequence, give positions, no reset and no initial_state')
    longest = max(call['lags'] or (call['weight'].shape[0] - 1,))
    call |= {'initial_state': exchange.previous(call['x'], longest, axis_name), 'mask': None}
    return api.causal_conv1d(**call)[0], None


CALL = Call(
    api.causal_conv1d,
    results=lambda _: ('b t c', 'b l c'),
    axes={'b': 'batch', 't': 'sequence', 'c': 'inner'},
    context_parallel=causal_conv1d,
    # A shard knows no reset before its slice; a state that comes in must go out again.
    whole=lambda arguments: ('t',) if arguments['reset'] is not None or arguments['initial_state'] is not None else (),
)
