"""What Hyena and its modal form share: projections, short convolutions and gates around long causal filters."""

import abc
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import (
    Aux,
    Parameters,
    ShortConv,
    State,
    biased,
    keeping_arguments,
    normal,
    output_std,
    project,
    widened,
    zeros,
)


class GatedConvolution(Layer):
    """z = v; z = h_i * (x_i z) for i = N-1, ..., 1; out = (x_0 z) W_o + b_o (Poli et al., 2023).

    x_0, ..., x_(N-1) and v are projections with bias, each through a short causal convolution with bias and without
    activation. The long filters h_1, ..., h_(N-1) are a subclass's. This is the released code's order: N = 2 has one
    long filter, where the paper's definition would have two.

    Args:
      config: ``config.model``.
      params: makes the parameters.
      num_layers: layers of the whole model, for the scale of the output projection.
      order: N >= 2.
      d_conv: width of the short convolutions.
    """

    def __init__(self, config, params: Parameters, num_layers: int, order: int, d_conv: int) -> None:
        self.dim, self.dtype, self.filters = config.dim, jnp.dtype(config.dtype), order - 1
        for name in self.branches:
            weight = params(f'{name}_proj', (self.dim, self.dim), ('embed', 'inner'), normal(config.init_std))
            setattr(self, f'{name}_proj', weight)
            setattr(self, f'{name}_bias', params(f'{name}_bias', (self.dim,), ('inner',), zeros))
            setattr(self, f'{name}_conv', ShortConv(d_conv, self.dim, params.scope(f'{name}_conv')))
        self.o_proj = params(
            'o_proj', (self.dim, self.dim), ('inner', 'embed'), normal(output_std(config.init_std, num_layers))
        )
        self.o_bias = params('o_bias', (self.dim,), ('embed',), zeros)

    @property
    def branches(self) -> tuple[str, ...]:
        """x0, ..., x(N-1) and v."""
        return (*(f'x{i}' for i in range(self.filters + 1)), 'v')

    @abc.abstractmethod
    def filter_states(self, batch: int, max_len: int) -> list[Any]:
        """What each long filter carries from call to call, before the first token."""

    @abc.abstractmethod
    def filtered(
        self, values: Float[Array, 'b t d'], index: int, context: Context, state: Any
    ) -> tuple[Float[Array, 'b t d'], Any]:
        """The convolution of every channel with long filter ``index``, counted from 0, and its new state or None."""

    def init_state(self, batch: int, max_len: int) -> State:
        windows = {name: getattr(self, f'{name}_conv').init_state(batch, self.dtype) for name in self.branches}
        return windows | {'filters': self.filter_states(batch, max_len)}

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        old, new, values = {} if state is None else state, {}, {}
        for name in self.branches:
            projected = biased(project(x, getattr(self, f'{name}_proj')), getattr(self, f'{name}_bias')[...])
            values[name], new[name] = getattr(self, f'{name}_conv')(projected, context, old.get(name))
        z, states = values['v'], [None] * self.filters
        for index in reversed(range(self.filters)):
            before = None if state is None else state['filters'][index]
            z, states[index] = self.filtered(product(values[f'x{index + 1}'], z), index, context, before)
        y = biased(project(product(values['x0'], z), self.o_proj), self.o_bias[...])
        return y, None if state is None else new | {'filters': states}, {}


@keeping_arguments
def product(x: Float[Array, '*b c'], y: Float[Array, '*b c']) -> Float[Array, '*b c']:
    """x times y in x's type, computed in at least float32."""
    return (widened(x) * widened(y)).astype(x.dtype)
