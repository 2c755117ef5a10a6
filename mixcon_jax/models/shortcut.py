"""Augmented shortcuts: a second, narrow way around a mixer."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from mixcon_jax.models.layers import Parameters, keeping_arguments, normal, project, widened, zeros


class AugmentedShortcut(nnx.Module):
    """T(x) = W_out GELU(W_in x), added to what a mixer makes of the same x (PanGu-pi, Wang et al., 2023, section 3).

    W_out starts at zero, so that at first the model is the one without it. One shortcut a mixer, of width
    dim / reduction, as the paper has it; it reads the normed input, of which the paper says nothing.
    """

    def __init__(self, config, params: Parameters) -> None:
        width = max(1, config.dim // config.shortcut.reduction)
        self.w_in = params('w_in', (config.dim, width), ('embed', 'narrow'), normal(config.init_std))
        self.w_out = params('w_out', (width, config.dim), ('narrow', 'embed'), zeros)

    def __call__(self, x: Float[Array, 'b t d']) -> Float[Array, 'b t d']:
        return project(_gelu(project(x, self.w_in)), self.w_out)


@keeping_arguments
def _gelu(x: Float[Array, '*b']) -> Float[Array, '*b']:
    return jax.nn.gelu(widened(x), approximate=False).astype(x.dtype)
