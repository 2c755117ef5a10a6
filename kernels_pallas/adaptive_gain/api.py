"""Entry points of the adaptive gain: check shapes, form the error features, pick an implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import choice
from kernels_pallas.adaptive_gain import mosaic_gpu, reference, xla

IMPLEMENTATIONS = ('reference', 'chunked')
MATRIX_IMPLEMENTATIONS = (*IMPLEMENTATIONS, 'mosaic_gpu')


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
    choice.check_known('matrix_gain', implementation, MATRIX_IMPLEMENTATIONS)
    e, alpha, log_decay, reset, gain = _check('matrix_gain', e, alpha, log_decay, reset, initial_gain, 2)
    refusal = lambda: mosaic_gpu.unsupported(e.dtype, e.shape[3])
    variants = lambda: mosaic_gpu.variants(e.shape[3])
    if choice.takes_kernel('matrix_gain', implementation, refusal, 'chunked', variants, kernel='adaptive_gain'):
        return mosaic_gpu.matrix(e, alpha, log_decay, reset, gain)
    norm = jnp.sqrt(jnp.sum(e * e, -1, keepdims=True) + reference.EPS)
    phi = e / norm
    if implementation == 'reference':
        return reference.matrix(e, phi, alpha, log_decay, _array(reset, e), gain)
    if chunk < 1:
        raise ValueError(f'matrix_gain: chunk must be at least 1, got {chunk}')
    read, gain = xla.matrix(phi, alpha, log_decay, reset, gain, chunk)
    return norm * read, gain


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
    and errors as for `matrix_gain`, with gains [B, H, P].
    """
    choice.check_known('diagonal_gain', implementation, IMPLEMENTATIONS)
    e, alpha, log_decay, reset, gain = _check('diagonal_gain', e, alpha, log_decay, reset, initial_gain, 1)
    if implementation == 'reference':
        return reference.diagonal(e, alpha, log_decay, _array(reset, e), gain)
    return xla.diagonal(e, alpha, log_decay, reset, gain)


def _array(reset: jax.Array | None, e: jax.Array) -> jax.Array:
    return jnp.zeros(e.shape[:2], bool) if reset is None else reset


def _check(function, e, alpha, log_decay, reset, initial_gain, gain_rank):
    if e.ndim != 4 or e.shape[1] < 1:
        raise ValueError(f'{function}: e has shape {tuple(e.shape)}, expected [batch, time >= 1, heads, width]')
    batch, length, heads, width = e.shape
    gain_shape = (batch, heads) + (width,) * gain_rank
    for name, value, shape in (
        ('alpha', alpha, (batch, length, heads)),
        ('log_decay', log_decay, (batch, length, heads)),
        ('reset', reset, (batch, length)),
        ('initial_gain', initial_gain, gain_shape),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f'{function}: {name} has shape {tuple(value.shape)}, expected {shape}')
    dtype = jnp.promote_types(jnp.result_type(e, alpha, log_decay), jnp.float32)
    gain = jnp.zeros(gain_shape, dtype) if initial_gain is None else initial_gain.astype(dtype)
    reset = None if reset is None else reset.astype(bool)
    return e.astype(dtype), alpha.astype(dtype), log_decay.astype(dtype), reset, gain
