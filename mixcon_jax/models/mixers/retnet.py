"""RetNet's multi-scale retention: linear attention whose heads forget at fixed rates of their own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mixcon_jax.checks import ConfigError, divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import (
    Aux,
    Parameters,
    State,
    keeping_arguments,
    kept,
    normal,
    output_std,
    over_deviation,
    project,
    widened,
)
from mixcon_jax.models.rotary import rotate
from mixcon_jax.options import COUNT, POSITIVE, Option, above
from mixcon_jax.parallel.kernels import ssd


class RetNet(Layer):
    """out = (Swish(x W_g) * GroupNorm(retention)) W_o (Sun et al., 2023, equations 5 to 8).

    S_t = g_h S_{t-1} + v_t k_t^T, o_t = S_t q_t, with g_h = 1 - 2^(-5-h), h = 0, 1, ...; queries and keys are rotated
    by their positions, which with that decay is xPos. k is divided by sqrt(d_k); d_v = 2 d_k. The group norm is each
    head's own and has no weights, since W_o follows; by it the paper's normalisations of scores change nothing and are
    left out. The angles are those of this repository's rotary embedding, theta^(-2i/d) for the halves of a head.
    """

    OPTIONS = {
        'retnet': {
            'num_heads': Option(4, 'Heads.', POSITIVE),
            'head_dim': Option(
                0,
                'Width d_k of the queries and keys of a head; 0 means dim / num_heads.',
                COUNT,
                derive=lambda model: model.dim // model.retnet.num_heads,
            ),
            'value_factor': Option(2, 'Width d_v of the values of a head as a multiple of d_k.', POSITIVE),
            'theta': Option(10000.0, 'Base of the rotary frequencies.', above(0.0)),
            'chunk': Option(64, 'Tokens a chunk.', POSITIVE, free=True),
        }
    }

    @staticmethod
    def check(model) -> None:
        options = model.retnet
        if not options.head_dim:
            divides('model.retnet.num_heads', options.num_heads, 'model.dim', model.dim)
        if (head_dim := options.head_dim or model.dim // options.num_heads) % 2:
            raise ConfigError(f'model.retnet.head_dim={head_dim} must be even, as halves are rotated')

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['heads'], 'model.retnet.num_heads', model.retnet.num_heads)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """Scores of a chunk's tokens, their products with values, the state's update and its reading."""
        options = model.retnet
        keys, values = options.head_dim, options.value_factor * options.head_dim
        return options.num_heads * (2 * min(options.chunk, seq_len) * (keys + values) + 4 * keys * values)

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """A head's decays between the tokens of a chunk, computed again by the backward pass."""
        pairs = model.retnet.num_heads * float(min(model.retnet.chunk, seq_len))
        return pairs, pairs

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options, self.eps = config.retnet, config.norm_eps
        keys = self.options.num_heads * self.options.head_dim
        values, init = self.options.value_factor * keys, normal(config.init_std)
        self.q_proj = params('q_proj', (config.dim, keys), ('embed', 'heads'), init)
        self.k_proj = params('k_proj', (config.dim, keys), ('embed', 'heads'), init)
        self.v_proj = params('v_proj', (config.dim, values), ('embed', 'heads'), init)
        self.g_proj = params('g_proj', (config.dim, values), ('embed', 'heads'), init)
        self.o_proj = params(
            'o_proj', (values, config.dim), ('heads', 'embed'), normal(output_std(config.init_std, num_layers))
        )

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the constant-size state; ``max_len`` is not needed."""
        del max_len
        keys = self.options.head_dim
        shape = (batch, self.options.num_heads, self.options.value_factor * keys, keys)
        return {'retention': jnp.zeros(shape, jnp.float32)}

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        options, heads = self.options, self.options.num_heads
        by_head = lambda weight: project(x, weight).reshape(*x.shape[:2], heads, -1)
        q, k = (rotate(by_head(w), context.positions, options.theta) for w in (self.q_proj, self.k_proj))
        k = k / math.sqrt(options.head_dim)
        log_decay = jnp.broadcast_to(jnp.asarray(log_decays(heads), jnp.float32), (*x.shape[:2], heads))
        if state is not None:  # padding leaves the state as it is; without one nobody asks for it
            k = jnp.where(context.mask[..., None, None], k, 0)
            log_decay = jnp.where(context.mask[..., None], log_decay, 0)
        y, final = ssd(
            by_head(self.v_proj),
            log_decay,
            kept(k),
            kept(q),
            reset=context.reset,
            initial_state=None if state is None else state['retention'],
            chunk=options.chunk,
        )
        y = self._gated(y, by_head(self.g_proj)).reshape(*x.shape[:2], -1)
        return project(y, self.o_proj), None if state is None else {'retention': final}, {}

    def _gated(self, y: Float[Array, 'b t h p'], gate: Float[Array, 'b t h p']) -> Float[Array, 'b t h p']:
        eps = self.eps

        @keeping_arguments
        def gated(y, gate):
            wide = over_deviation(widened(y), eps)
            return (wide * jax.nn.silu(widened(gate))).astype(y.dtype)

        return gated(y, gate)


def log_decays(heads: int) -> np.ndarray:
    """log(1 - 2^(-5-h)) of every head (Sun et al., 2023, §3.1)."""
    return np.log1p(-(2.0 ** (-5 - np.arange(heads))))
