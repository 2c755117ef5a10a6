"""The entry point of the long causal convolution: checks shapes, picks an implementation, carries the state."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.call import sizes
from kernels_pallas.causal_conv1d import causal_conv1d
from kernels_pallas.dispatch import Candidate, choose
from kernels_pallas.long_conv import xla

WORDS = {'b': 'batch', 't': 'time >= 1', 'c': 'channels', 'k': 'lags >= 1'}


def long_conv(
    x: Float[Array, 'b t c'],
    weight: Float[Array, 'k c'],
    *,
    positions: Int[Array, 'b t'] | None = None,
    mask: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b l c'] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, 'b t c'], Float[Array, 'b l c']]:
    """`y_t = sum_{j<K} weight_j x_{t-j}` for every channel, never across the start of a document.

    What `causal_conv1d` computes with lags 0 to K - 1, for kernels whose lags are too many to be written out. Products
    and sums are in float32, or in float64 for a float64 x; y has x's type.

    Args:
      x: [B, T, C], any float type, T >= 1.
      weight: [K, C], by lag: the first meets the current token.
      positions: int [B, T], each token's place in its document, 0 the first. A call that continues an earlier one
        continues its positions, and a token reads no further back than its position.
      mask: bool [B, T], the real tokens, as of `causal_conv1d`.
      initial_state: [B, L, C], the last L = K - 1 tokens before this call; zeros if None. Differentiable.
      implementation: None or 'blocked', a loop over blocks of lags, forwards and backwards, whose memory is linear in T
        and does not grow with K; 'reference' is `causal_conv1d`'s sequential form.

    Returns:
      `(y [B, T, C], final state [B, L, C])`, which continues the sequence as initial_state.

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist.
    """
    longest = weight.shape[0] - 1
    sizes(long_conv, locals(), WORDS, l=longest)
    rest: dict[str, Any] = {'positions': positions, 'mask': mask, 'initial_state': initial_state}
    candidates = (
        Candidate('blocked', lambda: xla.conv(x, weight, positions, initial_state)),
        Candidate(
            'reference',
            lambda: causal_conv1d(x, weight, lags=range(longest + 1), implementation='reference', **rest)[0],
            by_name=True,
        ),
    )
    y = choose('long_conv', implementation, candidates).run()
    # The short convolution knows what the last tokens are; its own sum, which nobody reads, is not computed.
    _, final = causal_conv1d(x, jnp.zeros((1, x.shape[-1])), lags=(longest,), implementation='xla', **rest)
    return y, final
