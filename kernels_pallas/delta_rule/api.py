"""The entry point of the generalised delta rule: checks shapes and picks an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.call import sizes
from kernels_pallas.delta_rule import reference, xla
from kernels_pallas.dispatch import Candidate, choose

WORDS = {'b': 'batch', 't': 'time >= 1', 'h': 'heads >= 1', 'p': 'values', 'n': 'keys'}


def delta_rule(
    x: Float[Array, 'b t h p'],
    log_decay: Float[Array, 'b t h n'],
    B: Float[Array, 'b t h n'],
    C: Float[Array, 'b t h n'],
    removed: Float[Array, 'b t h n'],
    rewritten: Float[Array, 'b t h n'],
    *,
    reset: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b h p n'] | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, 'b t h p'], Float[Array, 'b h p n']]:
    """Runs `S_t = S_{t-1} (diag(exp(log_decay_t)) - removed_t rewritten_t^T) + x_t B_t^T`, `y_t = S_t C_t`.

    Source: RWKV-7 (Peng et al., 2025, §4): x is the value, B the replacement key, C the receptance, removed the
    normalised removal key, rewritten the same times the in-context learning rate. With no decay, and removed = B,
    rewritten = rate * B and x times the rate, it is the delta rule (Schlag et al., 2021). Everything between the
    arguments and the outputs is float32, or float64 if any argument is.

    Args:
      x: [B, T, H, P], any float type, T >= 1.
      log_decay: <= 0, [B, T, H, N]. A token of padding has 0 here, in B and in rewritten: it leaves the state as it is.
      B, C, removed, rewritten: [B, T, H, N]. The state stays bounded where removed is of length 1, and rewritten is
        removed times numbers in [0, 1].
      reset: bool [B, T]; the state is zero before a token where it is True (the start of a document).
      initial_state: [B, H, P, N]; zeros if None. Differentiable.
      implementation: None or 'chunked': a triangular system and products of matrices within a chunk, chunk after chunk,
        which the backward pass computes again: memory is linear in T. 'reference' is sequential.
      chunk: tokens a chunk; None for 32.

    Returns:
      `(y [B, T, H, P] in x's type, final state [B, H, P, N] in float32 or float64)`; the state continues the sequence
      as initial_state.

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f'delta_rule: chunk must be at least 1, got {chunk}')
    found = sizes(delta_rule, locals(), WORDS)
    arrays = (x, log_decay, B, C, removed, rewritten)
    wide = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((found['b'], found['h'], found['p'], found['n']), wide)
    reset = None if reset is None else reset.astype(bool)
    x, log_decay, B, C, removed, rewritten = (value.astype(wide) for value in arrays)
    given = (x, log_decay, B, C, removed, rewritten, reset, initial_state.astype(wide))
    candidates = (
        Candidate('chunked', lambda: xla.chunked(*given, chunk or xla.CHUNK)),
        Candidate('reference', lambda: reference.scan(*given), by_name=True),
    )
    y, final = choose('delta_rule', implementation, candidates).run()
    return y.astype(arrays[0].dtype), final
