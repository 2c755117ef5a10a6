"""A causal large kernel with dilated branches: UniRepLKNet's block for sequences."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.wkv import EMPTY, EXPONENTIALS, OPERATIONS
from mixcon_jax.checks import ConfigError, divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import (
    Aux,
    Parameters,
    State,
    biased,
    keeping_arguments,
    normal,
    ones,
    output_std,
    project,
    uniform,
    widened,
    zeros,
)
from mixcon_jax.options import COUNT, POSITIVE, Check, Option
from mixcon_jax.parallel.kernels import causal_conv1d, wkv

# Published branches by the kernel's size: sizes and dilations (Ding et al., 2024, as in their code).
BRANCHES = {
    1: ((), ()),
    5: ((3, 3), (1, 2)),
    7: ((5, 3, 3), (1, 2, 3)),
    9: ((5, 5, 3, 3), (1, 2, 3, 4)),
    11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
    13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)),
    15: ((5, 7, 3, 3, 3), (1, 2, 3, 5, 7)),
    17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)),
}


class LargeKernel(Layer):
    """y = W_2 GELU(W_1 (u * s)), u a depthwise causal convolution of x and s its squeeze and excitation.

    u_t = b + sum_j w_j x_{t-j} over K lags, w = a * kernel + sum over branches (k, r) of a_i * branch_i, whose tap j is
    at lag j r (UniRepLKNet, Ding et al., 2024, section 3.2 and figure 2, of which this is the one-dimensional causal
    form). A scale of each channel, a, takes the place of every batch norm, whose statistics would be of later tokens
    and other documents; b is their biases. s = sigmoid(V_2 max(V_1 m, 0)), m the mean of u over the document so far
    with weights e^(-(t - s) rate) in the place of one over the image, the rate learned by channel. What responds over
    all places, GRN, and the scale of the block's output, which W_2's initial values have, are left out.

    The branches are added up as weights, which gives what adding up their convolutions does. With ``merged`` there is
    the sum alone, as ``mixcon merge`` leaves it. No published checkpoint has it.
    """

    OPTIONS = {
        'large_kernel': {
            'kernel': Option(13, 'Lags that the convolution reads, the token itself included.', POSITIVE),
            'branch_sizes': Option(
                (),
                'Taps of each dilated branch; empty takes those of the largest published kernel that is no larger.',
                Check(lambda value: all(size >= 1 for size in value), 'sizes of at least 1'),
                element=int,
                derive=lambda model: BRANCHES[max(size for size in BRANCHES if size <= model.large_kernel.kernel)][0],
            ),
            'dilations': Option(
                (),
                'Tokens between the taps of each branch; empty takes the published ones, stretched with the kernel but'
                ' for the first.',
                Check(lambda value: all(step >= 1 for step in value), 'steps of at least 1'),
                element=int,
                derive=lambda model: tuple(
                    r if i == 0 else r * (model.large_kernel.kernel - 1) // (size - 1)
                    for size in [max(size for size in BRANCHES if size <= model.large_kernel.kernel)]
                    for i, r in enumerate(BRANCHES[size][1])
                ),
            ),
            'merged': Option(False, 'Have one kernel in the place of the branches, as `mixcon merge` makes it.'),
            'squeeze': Option(4, 'By how much the excitation is narrower than dim; 0 has none.', COUNT),
            'expand': Option(4, 'Width of the two maps behind the convolution as a multiple of dim.', POSITIVE),
        }
    }

    @staticmethod
    def check(model) -> None:
        options = model.large_kernel
        sizes, dilations = tuple(options.branch_sizes), tuple(options.dilations)
        if len(sizes) != len(dilations):
            raise ConfigError(
                f'model.large_kernel.branch_sizes={sizes} and model.large_kernel.dilations={dilations} are of'
                ' different lengths; give every branch both'
            )
        for size, step in zip(sizes, dilations, strict=True):
            if (size - 1) * step >= options.kernel:
                raise ConfigError(
                    f'model.large_kernel.kernel={options.kernel} has no lag {(size - 1) * step}, which a branch of'
                    f' {size} taps {step} tokens apart reads'
                )

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['inner'], 'model.dim', model.dim)
        divides(
            'mesh.tensor', shards['mlp'], 'model.large_kernel.expand * model.dim', model.large_kernel.expand * model.dim
        )

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """The convolution's, whose lags are many, and the running mean's."""
        return (2 * model.large_kernel.kernel + (OPERATIONS if model.large_kernel.squeeze else 0)) * model.dim

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """The running mean's, computed again by the backward pass."""
        del seq_len
        mean = float(EXPONENTIALS * model.dim) if model.large_kernel.squeeze else 0.0
        return mean, mean

    @classmethod
    def merge(cls, model, weights: Mapping[str, Array]) -> tuple[Mapping[str, Any], Mapping[str, Array]] | None:
        """The layer with one kernel in the place of the branches."""
        if model.large_kernel.merged:
            return None
        rest = {name: value for name, value in weights.items() if not name.startswith(('kernel', 'branch'))}
        return {'merged': True}, rest | {'kernel': folded(weights, model.large_kernel)}

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options = options = config.large_kernel
        dim, wide, init = config.dim, options.expand * config.dim, normal(config.init_std)
        self.dim, self.dtype = dim, jnp.dtype(config.dtype)
        for name, size in sizes_of(options).items():
            setattr(self, name, params(name, (size, dim), ('conv', 'inner'), uniform(size**-0.5)))
            if not options.merged:
                setattr(self, f'{name}_scale', params(f'{name}_scale', (dim,), ('inner',), ones))
        self.bias = params('bias', (dim,), ('inner',), zeros)
        if options.squeeze:
            narrow = max(1, dim // options.squeeze)
            self.log_rate = params('log_rate', (dim,), ('inner',), _log_rates)
            self.squeeze = params('squeeze', (dim, narrow), ('inner', 'narrow'), init)
            self.excite = params('excite', (narrow, dim), ('narrow', 'inner'), init)
        self.w_up = params('w_up', (dim, wide), ('embed', 'mlp'), init)
        self.w_down = params('w_down', (wide, dim), ('mlp', 'embed'), normal(output_std(config.init_std, num_layers)))

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the last K - 1 tokens and the sums of the mean; ``max_len`` is not needed."""
        del max_len
        state = {'window': jnp.zeros((batch, self.options.kernel - 1, self.dim), self.dtype)}
        if self.options.squeeze:
            state['mean'] = jnp.zeros((batch, 3, self.dim), jnp.float32).at[:, 2].set(EMPTY)
        return state

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        mask = None if state is None else context.mask  # without a state nobody asks what padding leaves
        weights = {
            name: variable[...] for name, variable in vars(self).items() if name.startswith(('kernel', 'branch'))
        }
        u, window = causal_conv1d(
            x,
            folded(weights, self.options),
            lags=range(self.options.kernel),
            positions=context.positions,
            mask=mask,
            initial_state=None if state is None else state['window'],
        )
        u = biased(u, self.bias[...])
        new = {'window': window}
        if self.options.squeeze:
            rate = jnp.exp(self.log_rate[...])
            # With keys of 0 and the rate as the bonus its weights are e^(-(t - s) rate), those of a running mean.
            mean, new['mean'] = wkv(
                jnp.zeros_like(u),
                u,
                rate,
                rate,
                reset=context.reset,
                mask=mask,
                initial_state=None if state is None else state['mean'],
            )
            u = _excited(u, project(jax.nn.relu(project(mean, self.squeeze)), self.excite))
        y = _gelu_product(project(u, self.w_up), self.w_down[...].astype(x.dtype))
        return y, None if state is None else new, {}


def sizes_of(options) -> dict[str, int]:
    """The taps of the kernel and, unless it is merged, of each branch, by the name of the weights."""
    branches = () if options.merged else options.branch_sizes
    return {'kernel': options.kernel} | {f'branch_{i}': size for i, size in enumerate(branches)}


def folded(weights: Mapping[str, Float[Array, '...']], options) -> Float[Array, 'k d']:
    """The one kernel, by lag, that computes what the kernel and its branches do together.

    Args:
      weights: ``kernel [K, D]``, ``branch_0 [k, D]``, ... and the scale of each, ``kernel_scale [D]``, ...
      options: ``config.model.large_kernel``.
    """
    if options.merged:
        return weights['kernel']
    total = weights['kernel'] * weights['kernel_scale']
    for i, (size, step) in enumerate(zip(options.branch_sizes, options.dilations, strict=True)):
        branch = weights[f'branch_{i}'] * weights[f'branch_{i}_scale']
        beyond = options.kernel - 1 - (size - 1) * step
        total = total + jax.lax.pad(branch, jnp.zeros((), branch.dtype), ((0, beyond, step - 1), (0, 0, 0)))
    return total


def _log_rates(key, shape):
    """Rates log-uniform from 1/256 to 1/4, by which a mean reaches back over some 4 to 256 tokens."""
    return jax.random.uniform(key, shape, minval=-math.log(256), maxval=-math.log(4))


@keeping_arguments
def _excited(u: Float[Array, 'b t d'], logit: Float[Array, 'b t d']) -> Float[Array, 'b t d']:
    return (widened(u) * jax.nn.sigmoid(widened(logit))).astype(u.dtype)


@keeping_arguments
def _gelu_product(hidden: Float[Array, '*b f'], weight: Float[Array, 'f d']) -> Float[Array, '*b d']:
    """GELU(hidden) weight; the backward pass keeps hidden."""
    return jax.nn.gelu(widened(hidden), approximate=False).astype(hidden.dtype) @ weight
