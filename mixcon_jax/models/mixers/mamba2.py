"""Mamba-2's mixer: one decay a head and step, so that a chunk of tokens is products of matrices (SSD)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mixcon_jax.checks import at_most, divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import (
    Aux,
    Parameters,
    ShortConv,
    State,
    keeping_arguments,
    normal,
    ones,
    output_std,
    over_rms,
    project,
    project_halves,
    step_sizes,
    widened,
)
from mixcon_jax.models.published import Place, Published, Weights, depthwise, joined, linear, same
from mixcon_jax.options import POSITIVE, Option, above
from mixcon_jax.parallel.kernels import ssd


def _convolved(model) -> dict[str, int]:
    """What passes the short convolutions, and how wide it is."""
    inner, keys = model.mamba2.expand * model.dim, model.mamba2.groups * model.mamba2.d_state
    return {'conv': inner, 'conv_B': keys, 'conv_C': keys}


def _ours(value: np.ndarray, model) -> Weights:
    """The one projection of the released code, whose gate comes first."""
    inner, keys, _ = _convolved(model).values()
    z, u, B, C, dt = np.split(value.T, np.cumsum([inner, inner, keys, keys]), axis=1)
    return {'in_proj': np.concatenate([u, z], axis=1), 'B_proj': B, 'C_proj': C, 'dt_proj': dt}


def _theirs(weights: Mapping[str, np.ndarray], model) -> np.ndarray:
    u, z = np.split(weights['in_proj'], 2, axis=1)
    return np.concatenate([z, u, *(weights[f'{name}_proj'] for name in ('B', 'C', 'dt'))], axis=1).T


WEIGHTS = {
    'in_proj.weight': Place(_ours, _theirs),
    'conv1d.weight': joined(_convolved, lambda name: depthwise(f'{name}/weight')),
    'conv1d.bias': joined(_convolved, lambda name: same(f'{name}/bias')),
    'dt_bias': same('dt_bias'),
    'A_log': same('A_log'),
    'D': same('D'),
    'norm.weight': same('norm'),
    'out_proj.weight': linear('out_proj'),
}


class Mamba2(Layer):
    """State space duality with a gated norm (Dao and Gu, 2024, §7 and its released code).

    (u, z, B, C, dt) = x W, of which u, B and C pass a short convolution and SiLU; D_h = softplus(dt_h + b_h);
    S_t = exp(-D_h e^{A_h}) S_{t-1} + D_h u_t B_t^T; y_t = S_t C_t + d_h u_t; out = RMSNorm(y * SiLU(z)) W_o, the norm
    over each group's channels. Initial values are Mamba's: e^A uniform, softplus(b) log-uniform, d = 1.
    """

    OPTIONS = {
        'mamba2': {
            'd_state': Option(128, 'States N per channel.', POSITIVE),
            'expand': Option(2, 'Inner width d_in as a multiple of dim.', POSITIVE),
            'head_dim': Option(64, 'Channels P of a head; divides d_in.', POSITIVE),
            'groups': Option(1, 'Groups of heads that share B, C and a norm; divides the heads.', POSITIVE),
            'd_conv': Option(4, 'Width of the short causal convolutions.', POSITIVE),
            'chunk': Option(64, 'Tokens a chunk.', POSITIVE, free=True),
            'A_min': Option(1.0, 'Smallest initial decay rate.', above(0.0), learning=True),
            'A_max': Option(16.0, 'Largest initial decay rate.', above(0.0), learning=True),
            'dt_min': Option(1e-3, 'Smallest initial step size.', above(0.0), learning=True),
            'dt_max': Option(1e-1, 'Largest initial step size.', above(0.0), learning=True),
            'dt_floor': Option(1e-4, 'Lower clamp of the initial step size.', above(0.0), learning=True),
        }
    }
    PUBLISHED = {'mamba2': Published('mixer', WEIGHTS), 'bamba': Published('mamba', WEIGHTS)}

    @staticmethod
    def check(model) -> None:
        options, inner = model.mamba2, model.mamba2.expand * model.dim
        divides('model.mamba2.head_dim', options.head_dim, 'the inner width', inner)
        divides('model.mamba2.groups', options.groups, 'the number of heads', inner // options.head_dim)
        at_most('model.mamba2.dt_min', options.dt_min, 'model.mamba2.dt_max', options.dt_max)
        at_most('model.mamba2.A_min', options.A_min, 'model.mamba2.A_max', options.A_max)

    @staticmethod
    def check_split(model, shards) -> None:
        options = model.mamba2
        heads = options.expand * model.dim // options.head_dim
        divides('mesh.tensor', shards['heads'], 'model.mamba2.expand * model.dim / model.mamba2.head_dim', heads)
        if options.groups > 1:  # one is whole on every device
            divides('mesh.tensor', shards['heads'], 'model.mamba2.groups', options.groups)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """Scores of a chunk's tokens, a group; their products with u; the state's update and its reading."""
        options, inner = model.mamba2, model.mamba2.expand * model.dim
        chunk = min(options.chunk, seq_len)
        return 2 * chunk * (options.groups * options.d_state + inner) + 4 * inner * options.d_state

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """A head's decays between the tokens of a chunk, computed again by the backward pass."""
        pairs = model.mamba2.expand * model.dim // model.mamba2.head_dim * float(min(model.mamba2.chunk, seq_len))
        return pairs, pairs

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options = options = config.mamba2
        self.inner = inner = options.expand * config.dim
        self.heads = heads = inner // options.head_dim
        self.eps, self.dtype = config.norm_eps, jnp.dtype(config.dtype)
        keys, init = options.groups * options.d_state, normal(config.init_std)
        by_group = 'per_head' if options.groups > 1 else 'dt_rank'  # what all heads read is whole on every device
        self.in_proj = params('in_proj', (config.dim, 2 * inner), ('embed', 'inner'), init)
        self.B_proj = params('B_proj', (config.dim, keys), ('embed', by_group), init)
        self.C_proj = params('C_proj', (config.dim, keys), ('embed', by_group), init)
        self.dt_proj = params('dt_proj', (config.dim, heads), ('embed', 'per_head'), init)
        self.conv = ShortConv(options.d_conv, inner, params.scope('conv'))
        self.conv_B = ShortConv(options.d_conv, keys, params.scope('conv_B'))
        self.conv_C = ShortConv(options.d_conv, keys, params.scope('conv_C'))
        self.dt_bias = params('dt_bias', (heads,), ('heads',), step_sizes(options))
        self.A_log = params('A_log', (heads,), ('heads',), _decay_rates(options))
        self.D = params('D', (heads,), ('heads',), ones)
        self.norm = params('norm', (inner,), ('inner',), ones)
        self.out_proj = params(
            'out_proj', (inner, config.dim), ('inner', 'embed'), normal(output_std(config.init_std, num_layers))
        )

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the constant-size state; ``max_len`` is not needed."""
        del max_len
        options = self.options
        convs = {name: getattr(self, name).init_state(batch, self.dtype) for name in ('conv', 'conv_B', 'conv_C')}
        return convs | {'ssd': jnp.zeros((batch, self.heads, options.head_dim, options.d_state), jnp.float32)}

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        new: dict[str, Any] = {}

        def convolved(name: str, value: Array) -> Array:
            old = None if state is None else state[name]
            value, new[name] = getattr(self, name)(value, context, old, activation='silu')
            return value

        options = self.options
        u, z = project_halves(x, self.in_proj, 'inner')
        u = convolved('conv', u)
        grouped = lambda value: value.reshape(*x.shape[:2], options.groups, options.d_state)
        B = grouped(convolved('conv_B', project(x, self.B_proj)))
        C = grouped(convolved('conv_C', project(x, self.C_proj)))
        dt = jax.nn.softplus(widened(project(x, self.dt_proj)) + self.dt_bias[...])
        if state is not None:  # padding leaves the state as it is; without one nobody asks for it
            dt = jnp.where(context.mask[..., None], dt, 0)
        y, final = ssd(
            u.reshape(*x.shape[:2], self.heads, options.head_dim),
            -jnp.exp(self.A_log[...]) * dt,
            B,
            C,
            step=dt,
            reset=context.reset,
            initial_state=None if state is None else state['ssd'],
            chunk=options.chunk,
        )
        y = self._gated(y.reshape(u.shape), u, z)
        return project(y, self.out_proj), None if state is None else new | {'ssd': final}, {}

    def _gated(self, y: Float[Array, 'b t i'], u: Float[Array, 'b t i'], z: Float[Array, 'b t i']):
        """The skip, the gate, then the norm over each group's channels."""
        groups, width, eps = self.options.groups, self.options.head_dim, self.eps

        @keeping_arguments
        def gated(y, u, z, D, scale):
            wide = (widened(y) + jnp.repeat(D, width) * widened(u)) * jax.nn.silu(widened(z))
            parts = over_rms(wide.reshape(*y.shape[:2], groups, -1), eps)
            return (parts.reshape(y.shape) * scale).astype(y.dtype)

        return gated(y, u, z, self.D[...], self.norm[...])


def _decay_rates(options):
    """Logarithms of rates uniform in [A_min, A_max] (Dao and Gu, 2024)."""
    return lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=options.A_min, maxval=options.A_max))
