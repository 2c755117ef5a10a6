"""Entry points of the adaptive gain: check shapes, form the error features, pick an implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.adaptive_gain import diagonal_mosaic_gpu, mosaic_gpu, reference, xla
from kernels_pallas.call import sizes
from kernels_pallas.dispatch import Candidate, choose

WORDS = {'b': 'batch', 't': 'time >= 1', 'h': 'heads', 'p': 'width'}


def matrix_gain(
    e: Float[Array, 'b t h p'],
    alpha: Float[Array, 'b t h'],
    log_decay: Float[Array, 'b t h'],
    *,
    reset: Bool[Array, 'b t'] | None = None,
    initial_gain: Float[Array, 'b h p p'] | None = None,
    implementation: str | None = None,
    chunk: int = 32,
) -> tuple[Float[Array, 'b t h p'], Float[Array, 'b h p p']]:
    """Reads `K_k e_k`, then moves K by one descent step on the corrected error (MixCon, eq. 11).

    `K_{k+1} = lam_k K_k (I - alpha_k phi_k phi_k^T) + alpha_k phi_k phi_k^T`, with `phi = e / sqrt(|e|^2 + 1e-6)` and
    `lam = exp(log_decay)`. Computed in float32, or in float64 if any input is float64.

    Args:
      e: tracking error [B, T, H, P], any float type, T >= 1.
      alpha: step in (0, 1) [B, T, H]. Padding: alpha = 0 and log_decay = 0 leave the gain as it is.
      log_decay: log of the decay [B, T, H], <= 0.
      reset: bool [B, T]; the gain is zero before a token where it is True, so that this token already reads zero.
      initial_gain: [B, H, P, P]; zeros if None. Differentiable.
      implementation: None picks for the platform: 'mosaic_gpu' (a warp a head, gradients without atomics) on NVIDIA
        GPUs of compute capability 9.0 and newer that have verified it, for heads of 16 or 32 channels (a warning says
        when not), 'chunked' (WY form, parallel in a chunk) elsewhere. 'reference' is sequential.
      chunk: tokens a chunk of 'chunked'.

    No row's or head's result depends on another: under `jax.shard_map` over both, nothing is communicated. 'mosaic_gpu'
    wants that wherever a mesh shards them; XLA alone would gather its inputs.

    Returns:
      `(K e [B, T, H, P], final gain [B, H, P, P])`; the final gain continues the scan as initial_gain.

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist or cannot
        run.
    """
    if chunk < 1:
        raise ValueError(f'matrix_gain: chunk must be at least 1, got {chunk}')
    e, alpha, log_decay, reset, gain = _inputs(matrix_gain, e, alpha, log_decay, reset, initial_gain, 2)

    def chunked() -> tuple[jax.Array, jax.Array]:
        length = _length(e)
        read, final = xla.matrix(e / length, alpha, log_decay, reset, gain, chunk)
        return length * read, final

    candidates = (
        Candidate(
            'mosaic_gpu',
            lambda: mosaic_gpu.matrix(e, alpha, log_decay, reset, gain),
            lambda: mosaic_gpu.unsupported(e.dtype, e.shape[3]),
            lambda: mosaic_gpu.variants(e.shape[3]),
        ),
        Candidate('chunked', chunked),
        Candidate(
            'reference',
            lambda: reference.matrix(e, e / _length(e), alpha, log_decay, _array(reset, e), gain),
            by_name=True,
        ),
    )
    return choose('matrix_gain', implementation, candidates, kernel='adaptive_gain').run()


def diagonal_gain(
    e: Float[Array, 'b t h p'],
    alpha: Float[Array, 'b t h'],
    log_decay: Float[Array, 'b t h'],
    *,
    reset: Bool[Array, 'b t'] | None = None,
    initial_gain: Float[Array, 'b h p'] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, 'b t h p'], Float[Array, 'b h p']]:
    """The same gain kept diagonal: `K_{k+1} = lam (K_k (1 - alpha n_k) + alpha n_k)`, read before written.

    `n = min(1, e^2 / (mean over the head of e^2 + 1e-6))`, so K stays in [0, 1] if it starts there. Arguments, result
    and errors as for `matrix_gain`, with gains [B, H, P]; 'mosaic_gpu' takes heads of 16, 32 or 64 channels, and
    'chunked' is an affine scan.
    """
    e, alpha, log_decay, reset, gain = _inputs(diagonal_gain, e, alpha, log_decay, reset, initial_gain, 1)
    candidates = (
        Candidate(
            'mosaic_gpu',
            lambda: diagonal_mosaic_gpu.diagonal(e, alpha, log_decay, reset, gain),
            lambda: diagonal_mosaic_gpu.unsupported(e.dtype, e.shape[3]),
            lambda: diagonal_mosaic_gpu.variants(e.shape[3]),
        ),
        Candidate('chunked', lambda: xla.diagonal(e, alpha, log_decay, reset, gain)),
        Candidate('reference', lambda: reference.diagonal(e, alpha, log_decay, _array(reset, e), gain), by_name=True),
    )
    return choose('diagonal_gain', implementation, candidates, kernel='adaptive_gain').run()


def _length(e: Float[Array, 'b t h p']) -> Float[Array, 'b t h 1']:
    """Length of the error, kept from 0."""
    return jnp.sqrt(jnp.sum(e * e, -1, keepdims=True) + reference.EPS)


def _array(reset: jax.Array | None, e: jax.Array) -> jax.Array:
    return jnp.zeros(e.shape[:2], bool) if reset is None else reset


def _inputs(function, e, alpha, log_decay, reset, initial_gain, gain_rank):
    """What the implementations take, checked, in float32 or, if anything is float64, in that."""
    sizes(function, locals(), WORDS)
    batch, _, heads, width = e.shape
    dtype = jnp.promote_types(jnp.result_type(e, alpha, log_decay), jnp.float32)
    shape = (batch, heads) + (width,) * gain_rank
    gain = jnp.zeros(shape, dtype) if initial_gain is None else initial_gain.astype(dtype)
    reset = None if reset is None else reset.astype(bool)
    return e.astype(dtype), alpha.astype(dtype), log_decay.astype(dtype), reset, gain
