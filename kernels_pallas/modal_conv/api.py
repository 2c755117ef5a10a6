"""The entry point of the modal convolution: checks shapes and picks an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import platform
from kernels_pallas.call import sizes
from kernels_pallas.dispatch import Candidate, choose
from kernels_pallas.modal_conv import reference, xla

WORDS = {'b': 'batch', 't': 'time >= 1', 'd': 'channels', 's': 'modes >= 1', 'two': '2'}


def modal_conv(
    v: Float[Array, 'b t d'],
    rate: Float[Array, 's d'],
    angle: Float[Array, 's d'],
    residue: Float[Array, 'two s d'],
    *,
    skip: Float[Array, ' d'] | None = None,
    reset: Bool[Array, 'b t'] | None = None,
    mask: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b two s d'] | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, 'b t d'], Float[Array, 'b two s d']]:
    """`y_t = sum_{j <= t} h_{t-j} v_j + skip v_t` with `h_k = Re sum_n R_n exp((-rate_n + i angle_n) k)`, by channel.

    The filter of StripedHyena: modes of a linear recurrence, whose S complex states `s_t = exp(-rate + i angle) s_{t-1}
    + v_t` are all that is left of the past. Computed in float32, or float64 if an input is; y has v's type.

    Args:
      v: [B, T, D], any float type, T >= 1.
      rate, angle: [S, D], of each mode what its logarithm loses and how far it turns at a token; rate >= 0.
      residue: [2, S, D], real and imaginary part of R.
      skip: [D].
      reset: bool [B, T]; no token sees what is before one where it is True (the start of a document).
      mask: bool [B, T], the real tokens; the others leave the state as it is, and their y is arbitrary.
      initial_state: [B, 2, S, D], real and imaginary part; zeros if None. Differentiable.
      implementation: None picks. 'chunked': chunks that the backward pass computes again, so that memory is linear in
        T; a chunk is stepped on CPU, an associative scan elsewhere, as 'chunked_stepped' and 'chunked_associative' say.
        'parallel': all chunks at once, by products; without a mask, first where there is no CPU, and its chunk is 4
        times a power of two. 'reference' is sequential.
      chunk: tokens a chunk; None picks for the platform.

    Returns:
      `(y [B, T, D], final state [B, 2, S, D])`, which continues the sequence as initial_state.

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f'modal_conv: chunk must be at least 1, got {chunk}')
    found = sizes(modal_conv, locals(), WORDS, two=2)
    wide = jnp.promote_types(jnp.result_type(v, rate, angle, residue), jnp.float32)
    values, rate, angle, residue = (x.astype(wide) for x in (v, rate, angle, residue))
    shape = (found['b'], 2, found['s'], found['d'])
    state = jnp.zeros(shape, wide) if initial_state is None else initial_state.astype(wide)
    given = (values, reference.poles(rate, angle), residue, reset, mask, state)
    given_now = (values, rate, angle, residue, reset, None if initial_state is None else state, chunk)
    refused = 'a mask and single tokens need one chunk after another' if mask is not None or found['t'] == 1 else None
    if chunk is not None and not xla.doubled(chunk):
        refused = f'its chunk is {xla.SHORTEST} times a power of two, got {chunk}'
    candidates = (
        Candidate('parallel', lambda: xla.parallel(*given_now), lambda: refused, by_name=platform.platform() == 'cpu'),
        Candidate('chunked', lambda: xla.chunked(*given, chunk)),
        Candidate('chunked_associative', lambda: xla.chunked(*given, chunk, 'associative'), by_name=True),
        Candidate('chunked_stepped', lambda: xla.chunked(*given, chunk, 'stepped'), by_name=True),
        Candidate('reference', lambda: reference.scan(*given), by_name=True),
    )
    y, final = choose('modal_conv', implementation, candidates).run()
    if skip is not None:
        y = y + skip.astype(wide) * values
    return y.astype(v.dtype), final
