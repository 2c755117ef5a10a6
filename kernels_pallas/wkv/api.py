"""The entry point of WKV: checks shapes and picks an implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.call import sizes
from kernels_pallas.dispatch import Candidate, choose
from kernels_pallas.wkv import reference, xla

WORDS = {'b': 'batch', 't': 'time >= 1', 'd': 'channels', 'three': '3'}


def wkv(
    k: Float[Array, 'b t d'],
    v: Float[Array, 'b t d'],
    decay: Float[Array, ' d'],
    bonus: Float[Array, ' d'],
    *,
    reset: Bool[Array, 'b t'] | None = None,
    mask: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b three d'] | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, 'b t d'], Float[Array, 'b three d']]:
    """Weighted means of values: weights e^(k_s - (t-1-s) decay) of the tokens before t, e^(k_t + bonus) of t itself.

    Source: RWKV-4 (Peng et al., 2023, equations 16 and D.2). Sums are kept as numerator and denominator over the
    exponential of the largest exponent so far, so that none overflows; float32, or float64 if an input is.

    Args:
      k, v: [B, T, D], any float type, T >= 1.
      decay: [D], >= 0, what an exponent loses at each token.
      bonus: [D].
      reset: bool [B, T]; no token sees what is before one where it is True (the start of a document).
      mask: bool [B, T], the real tokens; the others, also where reset is True, leave the state as it is, and their y is
        arbitrary.
      initial_state: [B, 3, D]: numerator, denominator, exponent; `EMPTY` is the exponent of nothing, which None is.
        Differentiable in its first two rows: the third only scales them.
      implementation: None or 'chunked' (chunks that the backward pass computes again: memory is linear in T; a chunk is
        stepped on CPU, an associative scan elsewhere; 'chunked_stepped' and 'chunked_associative' say which);
        'reference' is sequential.
      chunk: tokens a chunk; None picks for the platform.

    Returns:
      `(y [B, T, D] in v's type, final state [B, 3, D])`, which continues the sequence as initial_state.

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f'wkv: chunk must be at least 1, got {chunk}')
    found = sizes(wkv, locals(), WORDS, three=3)
    wide = jnp.promote_types(jnp.result_type(k, v, decay, bonus), jnp.float32)
    k, values, decay, bonus = (value.astype(wide) for value in (k, v, decay, bonus))
    if initial_state is None:
        state = reference.nothing((found['b'], found['d']), wide)
    else:
        numerator, denominator, exponent = (initial_state.astype(wide)[:, i] for i in range(3))
        state = numerator, denominator, jax.lax.stop_gradient(exponent)
    reset = reset if reset is None or mask is None else reset & mask
    given = (k, values, decay, bonus, reset, mask, state)
    candidates = (
        Candidate('chunked', lambda: xla.chunked(*given, chunk)),
        Candidate('chunked_associative', lambda: xla.chunked(*given, chunk, 'associative'), by_name=True),
        Candidate('chunked_stepped', lambda: xla.chunked(*given, chunk, 'stepped'), by_name=True),
        Candidate('reference', lambda: reference.scan(*given), by_name=True),
    )
    y, final = choose('wkv', implementation, candidates).run()
    return y.astype(v.dtype), jnp.stack(final, 1)
