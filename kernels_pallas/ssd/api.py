"""The entry point of linear attention with decay: checks shapes and picks an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.call import sizes
from kernels_pallas.dispatch import Candidate, choose
from kernels_pallas.ssd import mosaic_gpu, reference, xla

WORDS = {
    'b': 'batch', 't': 'time >= 1', 'h': 'heads >= 1', 'p': 'values', 'g': 'groups >= 1', 'n': 'keys',
}  # fmt: skip


def ssd(
    x: Float[Array, 'b t h p'],
    log_decay: Float[Array, 'b t h *keys'],
    B: Float[Array, 'b t g n'],
    C: Float[Array, 'b t g n'],
    *,
    step: Float[Array, 'b t h'] | None = None,
    reset: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b h p n'] | None = None,
    exclusive: bool = False,
    implementation: str | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, 'b t h p'], Float[Array, 'b h p n']]:
    """Runs `S_t = S_{t-1} diag(exp(log_decay_t)) + step_t x_t B_t^T`, `y_t = S_t C_t` for every head.

    Source: Mamba-2's state space duality (Dao and Gu, 2024, §6) with one decay a head and step; retention (Sun et al.,
    2023) is the same with a constant decay, gated linear attention (Yang et al., 2023, §4) with one for every key
    dimension: x is the value, B the key, C the query. Decays, their sums, the state and all sums of products are
    float32, or float64 if any of x, log_decay, B, C is; factors of products have x's type.

    Args:
      x: [B, T, H, P], any float type, T >= 1.
      log_decay: <= 0, [B, T, H], or [B, T, H, N] for a decay of each key dimension. A token of padding has 0, and a B
        or a step of 0: it leaves the state as it is.
      B, C: [B, T, G, N]; G divides H, and head h has group h // (H / G).
      step: [B, T, H], multiplies x in at least float32; 1 if None.
      reset: bool [B, T]; the state is zero before a token where it is True (the start of a document).
      initial_state: [B, H, P, N]; zeros if None. Differentiable.
      exclusive: a token reads the state before it, `y_t = S_{t-1} C_t`, 0 where a document starts, as RWKV's do.
      implementation: None picks for the platform: 'mosaic_gpu' (bfloat16, one decay a head and step, 64 or 128 keys, a
        multiple of 64 values, 64 tokens or more) on NVIDIA GPUs of compute capability 9.x that have verified it,
        'chunked' elsewhere: products of matrices within a chunk, chunk after chunk, which the backward pass computes
        again. Memory is linear in T. 'reference' is sequential.
      chunk: tokens a chunk of 'chunked'; None for 64. Those of 'mosaic_gpu' are 64.

    Returns:
      `(y [B, T, H, P] in x's type, final state [B, H, P, N] in float32 or float64)`; the state continues the sequence
      as initial_state.

    Raises:
      ValueError: a shape that does not fit, naming the argument, an implementation that does not exist, or one that
        cannot run here.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f'ssd: chunk must be at least 1, got {chunk}')
    keys = (B.shape[-1],) if log_decay.ndim > 3 else ()
    found = sizes(ssd, locals(), WORDS, keys=keys)
    if found['h'] % found['g']:
        raise ValueError(f'ssd: B has {found["g"]} groups, expected a divisor of the {found["h"]} heads')
    wide = jnp.promote_types(jnp.result_type(x, log_decay, B, C), jnp.float32)
    cast = lambda value: None if value is None else value.astype(wide)
    if initial_state is None:
        initial_state = jnp.zeros((found['b'], found['h'], found['p'], found['n']), wide)
    reset = None if reset is None else reset.astype(bool)
    given = (x, cast(log_decay), B, C, cast(step), reset, cast(initial_state))
    candidates = (
        Candidate(
            'mosaic_gpu',
            lambda: mosaic_gpu.ssd(*given),
            lambda: mosaic_gpu.unsupported(*given[:4], exclusive),
            lambda: mosaic_gpu.variants(found['n']),
            silent=log_decay.ndim > 3 or exclusive or found['t'] < mosaic_gpu.CHUNK,
        ),
        Candidate('chunked', lambda: xla.chunked(*given, exclusive, chunk or xla.CHUNK)),
        Candidate('reference', lambda: reference.scan(*given, exclusive), by_name=True),
    )
    y, final = choose('ssd', implementation, candidates).run()
    return y.astype(x.dtype), final
