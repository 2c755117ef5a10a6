"""RWKV-4's time mixing: a weighted mean of past values with a fixed decay for every channel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.wkv import EMPTY, EXPONENTIALS, OPERATIONS
from mixcon_jax.checks import divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import Aux, Parameters, State, mixed, normal, output_std, project, token_shift, widened
from mixcon_jax.models.published import Published, channels, linear, same
from mixcon_jax.options import COUNT, Option
from mixcon_jax.parallel.kernels import wkv


class RWKV4(Layer):
    """out = (sigmoid(r) * wkv(k, v)) W_o (Peng et al., 2023, equations 11 to 16).

    r, k and v are projections of m * x_t + (1 - m) * x_{t-1}, each with a share m of its own; wkv is the mean of values
    with weights e^(k_s - (t-1-s) e^w) of past tokens and e^(k_t + u) of the token itself. Initial m, w and u depend on
    the channel and on the layer's depth, as in the released code.
    """

    OPTIONS = {
        'rwkv4': {
            'inner_dim': Option(0, 'Channels of r, k and v; 0 means dim.', COUNT, derive=lambda model: model.dim),
            'chunk': Option(0, 'Tokens a chunk of the scan; 0 picks for the platform.', COUNT, free=True),
        }
    }
    PUBLISHED = {
        'rwkv': Published(
            'attention',
            {
                'time_mix_key': channels('mix_k'),
                'time_mix_value': channels('mix_v'),
                'time_mix_receptance': channels('mix_r'),
                'key.weight': linear('k_proj'),
                'value.weight': linear('v_proj'),
                'receptance.weight': linear('r_proj'),
                'output.weight': linear('o_proj'),
                'time_decay': same('decay'),
                'time_first': same('bonus'),
            },
        )
    }

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['inner'], 'model.rwkv4.inner_dim', model.rwkv4.inner_dim)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """The updates and the reading of the sums."""
        return OPERATIONS * model.rwkv4.inner_dim

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """Those of the sums, computed again by the backward pass."""
        del seq_len
        sums = float(EXPONENTIALS * model.rwkv4.inner_dim)
        return sums, sums

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        dim, inner, init = config.dim, config.rwkv4.inner_dim, normal(config.init_std)
        self.inner, self.chunk, self.dim = inner, config.rwkv4.chunk or None, dim
        self.dtype = jnp.dtype(config.dtype)
        depth, left = params.index / max(1, num_layers - 1), 1 - params.index / num_layers
        shares = jnp.arange(dim) / dim
        self.mix_k = params('mix_k', (dim,), ('embed',), lambda key, shape: shares**left)
        self.mix_v = params('mix_v', (dim,), ('embed',), lambda key, shape: shares**left + 0.3 * depth)
        self.mix_r = params('mix_r', (dim,), ('embed',), lambda key, shape: shares ** (0.5 * left))
        places = jnp.arange(inner) / max(1, inner - 1)
        zigzag = 0.5 * ((jnp.arange(inner) + 1) % 3 - 1)
        self.decay = params('decay', (inner,), ('inner',), lambda key, shape: -5 + 8 * places ** (0.7 + 1.3 * depth))
        self.bonus = params('bonus', (inner,), ('inner',), lambda key, shape: jnp.log(0.3) + zigzag)
        self.k_proj = params('k_proj', (dim, inner), ('embed', 'inner'), init)
        self.v_proj = params('v_proj', (dim, inner), ('embed', 'inner'), init)
        self.r_proj = params('r_proj', (dim, inner), ('embed', 'inner'), init)
        self.o_proj = params(
            'o_proj', (inner, dim), ('inner', 'embed'), normal(output_std(config.init_std, num_layers))
        )

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the constant-size state; ``max_len`` is not needed."""
        del max_len
        return {
            'shift': jnp.zeros((batch, 1, self.dim), self.dtype),
            'wkv': jnp.zeros((batch, 3, self.inner), jnp.float32).at[:, 2].set(EMPTY),
        }

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        before, shift = token_shift(x, context, None if state is None else state['shift'])
        k = project(mixed(x, before, self.mix_k[...]), self.k_proj)
        v = project(mixed(x, before, self.mix_v[...]), self.v_proj)
        r = project(mixed(x, before, self.mix_r[...]), self.r_proj)
        y, sums = wkv(
            k,
            v,
            jnp.exp(self.decay[...]),
            self.bonus[...],
            reset=context.reset,
            mask=None if state is None else context.mask,  # without a state nobody asks what padding leaves
            initial_state=None if state is None else state['wkv'],
            chunk=self.chunk,
        )
        y = (jax.nn.sigmoid(widened(r)) * widened(y)).astype(x.dtype)
        return project(y, self.o_proj), None if state is None else {'shift': shift, 'wkv': sums}, {}
