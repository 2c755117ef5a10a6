"""SwiGLU whose gate is a series of activations."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixcon_jax.models.context import Context
from mixcon_jax.models.ffns.mlp import MLP
from mixcon_jax.models.layers import Aux, Parameters, State, keeping_arguments, project, widened, zeros
from mixcon_jax.options import POSITIVE, Option


class SeriesMLP(MLP):
    """down(phi(gate x) * up x) with phi(g) = sum_i SiLU(a_i g + b_i), a and b of every channel (PanGu-pi, Wang et al.,
    2023, equation 9, by the affine form that its count of parameters has).

    It starts with a = (1, 0, ...) and b = 0, where phi is SiLU: a model begins as the one with ``mlp``, whose width it
    shares. No published checkpoint has it.
    """

    OPTIONS = {'series_mlp': {'terms': Option(2, 'Activations that the gate sums.', POSITIVE)}}
    PUBLISHED = {}

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        super().__init__(config, params, num_layers)
        shape, axes = (config.series_mlp.terms, config.mlp.hidden_dim), ('terms', 'mlp')
        self.scale = params('scale', shape, axes, _first, decay=False)
        self.bias = params('bias', shape, axes, zeros, decay=False)

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        del context
        gate, up = project(x, self.w_gate), project(x, self.w_up)
        down = self.w_down[...].astype(x.dtype)
        return _series_swiglu(gate, up, self.scale[...], self.bias[...], down), state, {}


def _first(key: Array, shape: Sequence[int]) -> Float[Array, 'n f']:
    """1 for the first term, 0 for the others."""
    del key
    return jnp.zeros(shape, jnp.float32).at[0].set(1.0)


@keeping_arguments
def _series_swiglu(
    gate: Float[Array, '*b f'],
    up: Float[Array, '*b f'],
    scale: Float[Array, 'n f'],
    bias: Float[Array, 'n f'],
    weight: Float[Array, 'f d'],
) -> Float[Array, '*b d']:
    """(phi(gate) * up) weight; term after term, so that no array holds all of them."""
    wide = widened(gate)
    series = sum(jax.nn.silu(a * wide + b) for a, b in zip(scale, bias, strict=True))
    return (series * widened(up)).astype(gate.dtype) @ weight
