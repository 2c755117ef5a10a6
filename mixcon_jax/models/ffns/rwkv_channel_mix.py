"""RWKV-4's channel mixing: a squared ReLU of the token and the one before, gated by both."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixcon_jax.checks import divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import (
    Aux,
    Parameters,
    State,
    keeping_arguments,
    mixed,
    normal,
    output_std,
    project,
    token_shift,
    widened,
)
from mixcon_jax.models.published import Published, channels, linear
from mixcon_jax.options import COUNT, Option


class ChannelMix(Layer):
    """out = sigmoid(r) * (max(k, 0)^2 W_v) (Peng et al., 2023, equations 17 and 18).

    r and k are projections of m * x_t + (1 - m) * x_{t-1}, each with a share m of its own. The last token is its state.
    """

    OPTIONS = {
        'rwkv_channel_mix': {
            'hidden_dim': Option(0, 'Width of k; 0 means 4 dim.', COUNT, derive=lambda model: 4 * model.dim)
        }
    }
    PUBLISHED = {
        'rwkv': Published(
            'feed_forward',
            {
                'time_mix_key': channels('mix_k'),
                'time_mix_receptance': channels('mix_r'),
                'key.weight': linear('w_key'),
                'receptance.weight': linear('w_receptance'),
                'value.weight': linear('w_value'),
            },
        )
    }

    @staticmethod
    def check_split(model, shards) -> None:
        width = model.rwkv_channel_mix.hidden_dim
        divides('mesh.tensor', shards['mlp'], 'model.rwkv_channel_mix.hidden_dim', width)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        return 0.0

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        dim, width, init = config.dim, config.rwkv_channel_mix.hidden_dim, normal(config.init_std)
        self.dim, self.dtype = dim, jnp.dtype(config.dtype)
        shares, left = jnp.arange(dim) / dim, 1 - params.index / num_layers
        self.mix_k = params('mix_k', (dim,), ('embed',), lambda key, shape: shares**left)
        self.mix_r = params('mix_r', (dim,), ('embed',), lambda key, shape: shares**left)
        self.w_key = params('w_key', (dim, width), ('embed', 'mlp'), init)
        self.w_receptance = params('w_receptance', (dim, dim), ('embed', 'norm'), init)
        self.w_value = params(
            'w_value', (width, dim), ('mlp', 'embed'), normal(output_std(config.init_std, num_layers))
        )

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the last token, of which there is none yet; ``max_len`` is not needed."""
        del max_len
        return {'shift': jnp.zeros((batch, 1, self.dim), self.dtype)}

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        before, shift = token_shift(x, context, None if state is None else state['shift'])
        k = project(mixed(x, before, self.mix_k[...]), self.w_key)
        r = project(mixed(x, before, self.mix_r[...]), self.w_receptance)
        y = (jax.nn.sigmoid(widened(r)) * widened(project(_squared(k), self.w_value))).astype(x.dtype)
        return y, None if state is None else {'shift': shift}, {}


@keeping_arguments
def _squared(k: Float[Array, '*b f']) -> Float[Array, '*b f']:
    return jnp.square(jax.nn.relu(widened(k))).astype(k.dtype)
