"""The causal convolution's one entry point: checks shapes, says how far back a token reads, carries the state."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.call import sizes
from kernels_pallas.causal_conv1d import blocked, mosaic_gpu, reference, xla
from kernels_pallas.dispatch import Candidate, choose

WORDS = {'b': 'batch', 't': 'time >= 1', 'c': 'channels'}
FAR = 2**30  # further back than any lag
MANY = 9  # lags that are not written out, if it can be


def causal_conv1d(
    x: Float[Array, 'b t c'],
    weight: Float[Array, 'k c'],
    bias: Float[Array, ' c'] | None = None,
    *,
    lags: Sequence[int] | None = None,
    activation: str | None = None,
    residual: bool = False,
    positions: Int[Array, 'b t'] | None = None,
    reset: Bool[Array, 'b t'] | None = None,
    mask: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b l c'] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, 'b t c'], Float[Array, 'b l c']]:
    """`y_t = act(bias + sum_i weight_i x_{t - lag_i})` for every channel, never across the start of a document.

    A depthwise convolution of width K by default, whose last weight meets the current token (Mamba's, Gu and Dao 2023,
    §3.4). With other lags and `residual` the dilated taps of Conba: `x_t + sum_i weight_i x_{t - lag_i}`. Products and
    sums are in float32, or in float64 for a float64 x; y has x's type.

    Args:
      x: [B, T, C], any float type, T >= 1.
      weight: [K, C], one row a tap.
      bias: [C].
      lags: K different numbers >= 0; None for K - 1, ..., 0. L is the largest.
      activation: None or 'silu'.
      residual: add x itself, after the activation.
      positions: int [B, T], each token's place in its document, 0 the first. A call that continues an earlier one
        continues its positions, and a token reads no further back than its position.
      reset: bool [B, T], True at the first token of a document: what a caller without positions gives instead.
      mask: bool [B, T], the real tokens. A row may be padded after its last token, and the final state skips that
        padding; y is arbitrary there. A row without any real token keeps its state.
      initial_state: [B, L, C], the last L tokens before this call; zeros if None. Differentiable.
      implementation: None picks for the platform: 'mosaic_gpu' (shifted sums, and their gradient by one kernel) on
        NVIDIA GPUs of compute capability 9.0 and newer that have verified it, with 'silu' and lags of at most 8, 'xla'
        (shifted sums) elsewhere, or from 9 lags on 'blocked' (a loop over blocks of lags, whose memory does not grow
        with their number), if they are 0, 1, ... in order and nothing else is asked for. 'reference' is sequential.

    Returns:
      `(y [B, T, C], final state [B, L, C])`, the last L real tokens, zero where they belong to an earlier document than
      the last; it continues the sequence as initial_state.

    Raises:
      ValueError: a shape that does not fit, naming the argument, an option or implementation that does not exist, or an
        implementation that cannot run here.
    """
    lags = tuple(range(weight.shape[0] - 1, -1, -1)) if lags is None else tuple(int(lag) for lag in lags)
    if not lags or min(lags) < 0 or len(set(lags)) < len(lags):
        raise ValueError(f'causal_conv1d: lags must be different numbers >= 0, got {lags}')
    sizes(causal_conv1d, locals(), WORDS, k=len(lags), l=max(lags))
    if activation not in (None, 'silu'):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    if positions is not None and reset is not None:
        raise ValueError('causal_conv1d: give positions or reset, not both')
    reach = past_reach(reset) if positions is None and reset is not None else positions
    silu = activation == 'silu'
    shifted = lambda gradient: xla.conv(x, weight, bias, reach, initial_state, lags, silu, residual, gradient)
    candidates = (
        Candidate(
            'mosaic_gpu',
            lambda: shifted(mosaic_gpu.gradient),
            lambda: mosaic_gpu.unsupported(x.dtype, lags),
            lambda: mosaic_gpu.variants(silu),
            # Without SiLU, XLA fuses the sums with what surrounds them, and a layer moves less without it (README).
            by_name=not silu,
            silent=True,
        ),
        Candidate(
            'blocked',
            lambda: blocked.conv(x, weight, reach, initial_state),
            lambda: blocked.unsupported(lags, bias is not None or silu or residual),
            by_name=len(lags) < MANY,
            silent=True,
        ),
        Candidate('xla', lambda: shifted(None)),
        Candidate(
            'reference',
            lambda: _reference(x, weight, bias, lags, silu, residual, reach, initial_state),
            by_name=True,
        ),
    )
    y = choose('causal_conv1d', implementation, candidates).run()
    return y, _final_state(x, reach, mask, initial_state, max(lags))


def past_reach(reset: Bool[Array, 'b t']) -> Int[Array, 'b t']:
    """How far back a token may read: the tokens since its document's start, or any number before the first reset."""
    index = jnp.arange(reset.shape[1], dtype=jnp.int32)
    return index - lax.cummax(jnp.where(reset, index, -FAR), axis=1)


def _reference(x, weight, bias, lags, silu, residual, reach, initial_state):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cast = lambda value, shape: jnp.zeros(shape, wide) if value is None else value.astype(wide)
    batch, length, channels = x.shape
    reach = jnp.full((batch, length), FAR) if reach is None else reach
    past = cast(initial_state, (batch, max(lags), channels))
    y = reference.conv(cast(x, None), cast(weight, None), cast(bias, (channels,)), lags, silu, residual, reach, past)
    return y.astype(x.dtype)


def _final_state(x, reach, mask, initial_state, longest):
    batch, length, channels = x.shape
    past = jnp.zeros((batch, longest, channels), x.dtype) if initial_state is None else initial_state.astype(x.dtype)
    values = jnp.concatenate([past, x], 1)
    age = jnp.arange(longest - 1, -1, -1)  # of the state's entries, 0 for the last token
    if mask is None:
        state, back = values[:, length:], None if reach is None else reach[:, -1:]
    elif length == 1:  # decoding: a select in place of a gather
        state = jnp.where(mask[..., None], values[:, 1:], past)
        back = None if reach is None else jnp.where(mask, reach, FAR)
    else:
        ends = jnp.max(jnp.where(mask, jnp.arange(1, length + 1), 0), 1, keepdims=True)
        state = jnp.take_along_axis(values, (ends + jnp.arange(longest))[..., None], 1)
        back = None
        if reach is not None:
            last = jnp.take_along_axis(reach, jnp.maximum(ends - 1, 0), 1)
            back = jnp.where(ends > 0, last, FAR)
    return state if back is None else jnp.where((back >= age)[..., None], state, 0)
