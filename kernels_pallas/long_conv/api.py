"""The entry point of the long convolution: checks shapes, picks an implementation, carries the past."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.call import sizes
from kernels_pallas.dispatch import Candidate, choose
from kernels_pallas.long_conv import reference, xla

WORDS = {'b': 'batch', 't': 'time >= 1', 'd': 'channels', 'l': 'lags >= 1', 'p': 'past tokens'}


def long_conv(
    v: Float[Array, 'b t d'],
    taps: Float[Array, 'l d'],
    *,
    skip: Float[Array, ' d'] | None = None,
    positions: Int[Array, 'b t'] | None = None,
    mask: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b p d'] | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> tuple[Float[Array, 'b t d'], Float[Array, 'b p d'] | None]:
    """`y_t = sum_k taps_k v_{t-k} + skip v_t` for every channel, over the tokens of t's document alone.

    Hyena's convolution. Lags from L on count nothing. Products and sums are in float32, or in float64 if an input is; y
    has v's type. An output depends on its tokens so far, bit for bit, whatever comes later.

    Args:
      v: [B, T, D], any float type, T >= 1.
      taps: [L, D], the first for the token itself.
      skip: [D].
      positions: int [B, T], each token's place in its document, 0 the first. A call that continues an earlier one
        continues its positions. None: a row is one document.
      mask: bool [B, T], the real tokens. A row may be padded after its last token and, if there are positions, before
        its very first one; the
        final state skips that padding, and y is arbitrary there. A row without any real token keeps its state.
      initial_state: [B, P, D], the last P tokens before this call, zero where there are none or those of an earlier
        document. Differentiable.
      implementation: None or 'halves' (O(T log^2 T) operations); 'fft' (one FFT of the row where every row is
        one document from its first token on, which the mask tells from padding, and no state comes in; 'halves'
        elsewhere; later tokens count by rounding); 'reference' (lag by lag, O(T^2)).
      block: of 'halves', tokens that add lag by lag to each other; longer lags go through FFTs. None picks.

    Returns:
      `(y [B, T, D], final state [B, P, D] or None)`: what continues the sequence as initial_state, in its type.

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist or cannot
        take the call.
    """
    if block is not None and block < 1:
        raise ValueError(f'long_conv: block must be at least 1, got {block}')
    sizes(long_conv, locals(), WORDS)
    wide = jnp.promote_types(jnp.result_type(v, taps), jnp.float32)
    values, weights = v.astype(wide), taps.astype(wide)
    past = None if initial_state is None else initial_state.astype(wide)
    given = (values, weights, positions, past)
    candidates = (
        Candidate('halves', lambda: xla.halves(*given, block)),
        Candidate('fft', lambda: xla.fft(*given, mask, block), by_name=True),
        Candidate('reference', lambda: reference.conv(*given), by_name=True),
    )
    y = choose('long_conv', implementation, candidates).run()
    if skip is not None:
        y = y + skip.astype(wide) * values
    final = None if initial_state is None else _final_state(v, positions, mask, initial_state)
    return y.astype(v.dtype), final


def _final_state(v, positions, mask, past):
    """The last real tokens, those of the last one's document alone."""
    length, count = v.shape[1], past.shape[1]
    values = jnp.concatenate([past, v.astype(past.dtype)], 1)
    reach = jnp.full(v.shape[:2], length + count) if positions is None else positions
    if mask is None:
        state, back = values[:, length:], reach[:, -1:]
    elif length == 1:  # decoding: a select in place of a gather
        state, back = jnp.where(mask[..., None], values[:, 1:], past), jnp.where(mask, reach, count)
    else:
        ends = jnp.max(jnp.where(mask, jnp.arange(1, length + 1), 0), 1, keepdims=True)
        state = jnp.take_along_axis(values, (ends + jnp.arange(count))[..., None], 1)
        last = jnp.take_along_axis(reach, jnp.maximum(ends - 1, 0), 1)
        back = jnp.where(ends > 0, last, count)
    age = jnp.arange(count - 1, -1, -1)  # of the state's entries, 0 for the last token
    return jnp.where((back >= age)[..., None], state, 0)
