"""Conba's controller: the feedback gain, which learns to correct the tracking error (MixCon, equations 10 and 11)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters, constant, masked_mean, normal, project, stored, widened, zeros
from mixcon_jax.parallel.kernels import diagonal_gain, matrix_gain


class Law(NamedTuple):
    """What a gain needs besides the error: desired output, step sizes and forgetting."""

    reference: tuple[Array, ...]  # what `tracking_error` takes besides the output
    alpha: Float[Array, 'b t h'] | None
    log_decay: Float[Array, 'b t h'] | None


def tracking_error(
    y: Float[Array, 'b t i'],
    reference: Float[Array, 'b t i'] | None = None,
    weight: Float[Array, ' i'] | None = None,
    bias: Float[Array, ' i'] | None = None,
) -> Float[Array, 'b t i']:
    """y less the desired output, ``weight * reference + bias``, or without those the reference, or zero."""
    if reference is None:
        return y
    wide = widened(reference)
    return y - (wide if weight is None or bias is None else weight * wide + bias)


class Control(nnx.Module):
    """The feedback gain K and its update by the tracking error (eqs 10 and 11), for heads of P channels.

    With e = y - y_d and its direction phi, K forgets by lambda and learns phi by a step alpha:
    ``K+ = lambda K (I - alpha phi phi^T) + alpha phi phi^T``; the correction is ``kappa K e``.
    """

    def __init__(self, config, inner: int, params: Parameters) -> None:
        self.options = options = config.conba
        self.chunk = options.gain_chunk
        self.head_dim = options.head_dim
        self.heads = inner // options.head_dim
        dim, heads = config.dim, (self.heads,)
        if options.reference == 'diag':
            self.reference_weight = params('reference_weight', (inner,), ('inner',), zeros)
            self.reference_bias = params('reference_bias', (inner,), ('inner',), zeros)
        elif options.reference == 'proj':
            self.reference_proj = params('reference_proj', (dim, inner), ('embed', 'inner'), normal(config.init_std))
        if options.control == 'slow':
            shape = (self.heads, self.head_dim, self.head_dim)
            self.gain = params('gain', shape, ('gain', 'state', 'state'), zeros)
            return
        self.alpha_proj = params('alpha_proj', (dim, self.heads), ('embed', 'gain'), zeros)
        self.alpha_bias = params('alpha_bias', heads, ('gain',), constant(-2.0))
        self.decay_proj = params('decay_proj', (dim, self.heads), ('embed', 'gain'), zeros)
        self.decay_bias = params('decay_bias', heads, ('gain',), constant(-5.0))
        self.kappa = params('kappa', heads, ('gain',), constant(-5.0 if options.kappa == 'bounded' else 0.0))

    def init_state(self, batch: int, passes: int) -> Float[Array, 'b i h *p']:
        """Returns the gains of every pass: `[B, passes, H, P, P]`, or `[B, passes, H, P]` when diagonal."""
        width = (self.head_dim,) * (2 if self.options.control == 'matrix' else 1)
        return jnp.zeros((batch, passes, self.heads, *width), jnp.float32)

    def law(self, x: Float[Array, 'b t d'], u: Float[Array, 'b t i'], context: Context) -> Law:
        """Computes the desired output and the gain's step sizes; a padded token leaves the gain as it was."""
        reference: tuple[Array, ...] = ()
        if self.options.reference == 'diag':
            reference = stored(u), self.reference_weight[...], self.reference_bias[...]
        elif self.options.reference == 'proj':
            reference = (project(x, self.reference_proj),)
        if self.options.control == 'slow':
            return Law(reference, None, None)
        mask = context.mask[..., None]
        alpha = jax.nn.sigmoid(widened(project(x, self.alpha_proj)) + self.alpha_bias[...])
        log_decay = -jax.nn.softplus(widened(project(x, self.decay_proj)) + self.decay_bias[...])
        return Law(reference, jnp.where(mask, alpha, 0), jnp.where(mask, log_decay, 0))

    def correction(
        self,
        y: Float[Array, 'b t i'],
        law: Law,
        context: Context,
        gains: Array | None,
        i: int,
        error: Float[Array, 'b t i'] | None = None,
    ):
        """Returns ``kappa K e`` `[B, T, d_in]`, pass ``i``'s final gain and statistics; of y's error if not given."""
        error = tracking_error(y, *law.reference) if error is None else error
        error = error.reshape(*error.shape[:2], self.heads, self.head_dim)
        if self.options.control == 'slow':
            applied = jnp.einsum('bthp,hqp->bthq', error, self.gain[...].astype(error.dtype))
            return applied.reshape(y.shape), None, {}
        initial = None if gains is None else gains[:, i]
        if self.options.control == 'matrix':
            applied, gain = matrix_gain(
                error, law.alpha, law.log_decay, reset=context.reset, initial_gain=initial, chunk=self.chunk
            )
        else:
            applied, gain = diagonal_gain(error, law.alpha, law.log_decay, reset=context.reset, initial_gain=initial)
        kappa = jax.nn.sigmoid(self.kappa[...]) if self.options.kappa == 'bounded' else self.kappa[...]
        correction = (kappa[:, None] * applied).reshape(y.shape)
        power = masked_mean(y * y, context) + jnp.finfo(jnp.float32).tiny
        size = jnp.sqrt(jnp.sum(gain * gain, axis=tuple(range(2, gain.ndim))))
        stats = {
            'kappa': jnp.mean(kappa),
            'alpha': masked_mean(law.alpha, context),
            'decay': masked_mean(jnp.exp(law.log_decay), context),
            'gain_norm': masked_mean(size[:, None], context.rows),
            'correction': jnp.sqrt(masked_mean(correction * correction, context) / power),
        }
        return correction, gain, jax.tree.map(jax.lax.stop_gradient, stats)
