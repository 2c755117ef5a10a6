"""Gated linear attention: a matrix state whose every key dimension forgets by a gate of the token's own."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.ssd.xla import decays_by_key
from mixcon_jax.checks import divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import (
    Aux,
    Parameters,
    State,
    keeping_arguments,
    normal,
    ones,
    output_std,
    over_rms,
    project,
    widened,
    zeros,
)
from mixcon_jax.options import COUNT, POSITIVE, Option, above
from mixcon_jax.parallel.kernels import ssd


class GLA(Layer):
    """out = (Swish(x W_r + b_r) * RMSNorm(o)) W_o, the norm each head's own (Yang et al., 2023, §4.4).

    S_t = S_{t-1} diag(a_t) + v_t k_t^T, o_t = S_t q_t / sqrt(d_k), with a_t = sigmoid(x_t W_1 W_2 + b)^(1/tau), W_1 W_2
    of low rank. d_k = dim / 2 and d_v = dim in all. The norm is the released code's; the paper writes LayerNorm.
    """

    OPTIONS = {
        'gla': {
            'num_heads': Option(4, 'Heads.', POSITIVE),
            'key_dim': Option(
                0,
                'Width d_k of the queries and keys of a head; 0 means dim / 2 / num_heads.',
                COUNT,
                derive=lambda model: max(1, model.dim // 2 // model.gla.num_heads),
            ),
            'value_dim': Option(
                0,
                'Width d_v of the values of a head; 0 means dim / num_heads.',
                COUNT,
                derive=lambda model: model.dim // model.gla.num_heads,
            ),
            'gate_rank': Option(16, 'Rank of the forget gate.', POSITIVE),
            'temperature': Option(16.0, 'tau, by which the forget gate is slowed.', above(0.0)),
            'chunk': Option(64, 'Tokens a chunk.', POSITIVE, free=True),
        }
    }

    @staticmethod
    def check(model) -> None:
        options = model.gla
        if not options.value_dim:
            divides('model.gla.num_heads', options.num_heads, 'model.dim', model.dim)

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['heads'], 'model.gla.num_heads', model.gla.num_heads)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """Scores of a chunk's tokens, their products with values, the state's update and its reading."""
        options = model.gla
        keys, values = options.key_dim, options.value_dim
        return options.num_heads * (2 * min(options.chunk, seq_len) * (keys + values) + 4 * keys * values)

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """A key dimension's decays between the tokens of a block, and to the blocks' borders; again backward."""
        options = model.gla
        decays = options.num_heads * options.key_dim * decays_by_key(min(options.chunk, seq_len))
        return decays, decays

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options, self.eps = config.gla, config.norm_eps
        heads, rank = self.options.num_heads, self.options.gate_rank
        keys, values, init = heads * self.options.key_dim, heads * self.options.value_dim, normal(config.init_std)
        self.q_proj = params('q_proj', (config.dim, keys), ('embed', 'heads'), init)
        self.k_proj = params('k_proj', (config.dim, keys), ('embed', 'heads'), init)
        self.v_proj = params('v_proj', (config.dim, values), ('embed', 'heads'), init)
        self.gate_down = params('gate_down', (config.dim, rank), ('embed', 'dt_rank'), init)
        self.gate_up = params('gate_up', (rank, keys), ('dt_rank', 'heads'), init)
        self.gate_bias = params('gate_bias', (keys,), ('heads',), zeros)
        self.r_proj = params('r_proj', (config.dim, values), ('embed', 'heads'), init)
        self.r_bias = params('r_bias', (values,), ('heads',), zeros)
        self.norm = params('norm', (self.options.value_dim,), ('norm',), ones)
        self.o_proj = params(
            'o_proj', (values, config.dim), ('heads', 'embed'), normal(output_std(config.init_std, num_layers))
        )

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the constant-size state; ``max_len`` is not needed."""
        del max_len
        options = self.options
        return {'memory': jnp.zeros((batch, options.num_heads, options.value_dim, options.key_dim), jnp.float32)}

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        options = self.options
        by_head = lambda value: value.reshape(*x.shape[:2], options.num_heads, -1)
        k = by_head(project(x, self.k_proj)) / math.sqrt(options.key_dim)  # which q may be as well
        gate = widened(project(project(x, self.gate_down), self.gate_up)) + self.gate_bias[...]
        log_decay = by_head(jax.nn.log_sigmoid(gate) / options.temperature)
        if state is not None:  # padding leaves the state as it is; without one nobody asks for it
            real = context.mask[..., None, None]
            k, log_decay = jnp.where(real, k, 0), jnp.where(real, log_decay, 0)
        y, final = ssd(
            by_head(project(x, self.v_proj)),
            log_decay,
            k,
            by_head(project(x, self.q_proj)),
            reset=context.reset,
            initial_state=None if state is None else state['memory'],
            chunk=options.chunk,
        )
        y = self._gated(y, project(x, self.r_proj))
        return project(y, self.o_proj), None if state is None else {'memory': final}, {}

    def _gated(self, y: Float[Array, 'b t h p'], gate: Float[Array, 'b t v']) -> Float[Array, 'b t v']:
        eps = self.eps

        @keeping_arguments
        def gated(y, gate, scale, bias):
            wide = over_rms(widened(y), eps) * scale
            return (wide.reshape(gate.shape) * jax.nn.silu(widened(gate) + bias)).astype(y.dtype)

        return gated(y, gate, self.norm[...], self.r_bias[...])
