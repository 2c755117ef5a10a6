"""RWKV-7's time mixing (Goose): a matrix state a head that decays by key and rewrites what it holds under a key."""

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
    constant,
    keeping_arguments,
    mixed,
    normal,
    ones,
    output_std,
    over_deviation,
    project,
    token_shift,
    widened,
    zeros,
)
from mixcon_jax.options import COUNT, POSITIVE, Option, above
from mixcon_jax.parallel.kernels import delta_rule

# What is made of tokens shifted each by its own share: receptance, decay, key, value, rate, gate; and of the share of
# the token itself the power of the channel's place, and what depth adds to it.
STREAMS = {'r': (0.2, 0.0), 'w': (0.9, 0.0), 'k': (0.9, 0.4), 'v': (0.4, 0.6), 'a': (0.9, 0.0), 'g': (0.2, 0.0)}
SMALLEST = 1e-24  # of a removal key's squared length


class RWKV7(Layer):
    """out = (g * (LayerNorm(o) + (r diag(rho) k~^T) v)) W_o, the norm each head's own (Peng et al., 2025, §4).

    S_t = S_{t-1} (diag(w_t) - kappa_t^T (a_t * kappa_t)) + v_t^T k~_t, o_t = r_t S_t^T, with kappa = k * xi divided by
    its length in a head, k~ = k (1 + (a - 1) alpha), w = exp(-e^(-1/2) sigmoid(d + tanh(x^w A) B)), the rate
    a = sigmoid(a_0 + x^a A B) and g = sigmoid(x^g A) B. Each of r, w, k, v, a, g reads x_t + (x_{t-1} - x_t) m with a
    share m of its own. Initial shares and d depend on the channel and on the layer's depth, as in the
    released code. Values are the layer's own: the paper mixes them with those of the first layer, which a layer here
    does not see.
    """

    OPTIONS = {
        'rwkv7': {
            'num_heads': Option(4, 'Heads.', POSITIVE),
            'head_dim': Option(
                0,
                'Width of the receptances, keys and values of a head; 0 means dim / num_heads.',
                COUNT,
                derive=lambda model: model.dim // model.rwkv7.num_heads,
            ),
            'decay_rank': Option(64, 'Rank of what a token adds to the decay.', POSITIVE),
            'rate_rank': Option(64, 'Rank of what a token adds to the rate of rewriting.', POSITIVE),
            'gate_rank': Option(128, 'Rank of the gate.', POSITIVE),
            'norm_eps': Option(64e-5, 'Added to the variance in the norm of a head.', above(0.0)),
            'chunk': Option(32, 'Tokens a chunk.', POSITIVE, free=True),
        }
    }

    @staticmethod
    def check(model) -> None:
        options = model.rwkv7
        if not options.head_dim:
            divides('model.rwkv7.num_heads', options.num_heads, 'model.dim', model.dim)

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['heads'], 'model.rwkv7.num_heads', model.rwkv7.num_heads)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """A chunk's four tables of scores, their products with values, its system; the state read and changed twice."""
        options = model.rwkv7
        width, chunk = options.head_dim, min(options.chunk, seq_len)
        return options.num_heads * (15 * chunk * width + 8 * width * width + 5 * width)

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """A key dimension's decays between tokens, with those of the token itself and without; again backward."""
        options = model.rwkv7
        decays = 2 * options.num_heads * options.head_dim * decays_by_key(min(options.chunk, seq_len))
        return decays, decays

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options, self.dim, self.dtype = config.rwkv7, config.dim, jnp.dtype(config.dtype)
        dim, inner, init = config.dim, self.options.num_heads * self.options.head_dim, normal(config.init_std)
        depth, left = params.index / max(1, num_layers - 1), 1 - params.index / num_layers
        places = jnp.arange(inner) / max(1, inner - 1)

        def shares(key, shape):
            own = [(jnp.arange(dim) / dim) ** (power * left) + more * depth for power, more in STREAMS.values()]
            return 1 - jnp.stack(own)

        self.mix = params('mix', (len(STREAMS), dim), ('terms', 'embed'), shares, decay=False)
        slowness = lambda key, shape: -6.5 + 5 * places ** (0.85 + depth**0.5)
        self.decay = params('decay', (inner,), ('heads',), slowness)
        self.rate = params('rate', (inner,), ('heads',), zeros)
        down = lambda name, rank: params(f'{name}_down', (dim, rank), ('embed', 'dt_rank'), zeros)
        small = normal(0.1 / math.sqrt(inner))  # of the size of the released code's, whose rows are orthogonal besides
        up = lambda name, rank: params(f'{name}_up', (rank, inner), ('dt_rank', 'heads'), small)
        ranks = self.options.decay_rank, self.options.rate_rank, self.options.gate_rank
        self.decay_down, self.decay_up = down('decay', ranks[0]), up('decay', ranks[0])
        self.rate_down, self.rate_up = down('rate', ranks[1]), up('rate', ranks[1])
        self.gate_down, self.gate_up = down('gate', ranks[2]), up('gate', ranks[2])
        self.removal = params('removal', (inner,), ('heads',), constant(0.85))
        self.replacement = params('replacement', (inner,), ('heads',), ones)
        self.bonus = params('bonus', (inner,), ('heads',), zeros)
        self.r_proj = params('r_proj', (dim, inner), ('embed', 'heads'), init)
        self.k_proj = params('k_proj', (dim, inner), ('embed', 'heads'), init)
        self.v_proj = params('v_proj', (dim, inner), ('embed', 'heads'), init)
        self.norm = params('norm', (inner,), ('heads',), ones)
        self.norm_bias = params('norm_bias', (inner,), ('heads',), zeros)
        self.o_proj = params(
            'o_proj', (inner, dim), ('heads', 'embed'), normal(output_std(config.init_std, num_layers))
        )

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the constant-size state; ``max_len`` is not needed."""
        del max_len
        width = self.options.head_dim
        return {
            'shift': jnp.zeros((batch, 1, self.dim), self.dtype),
            'memory': jnp.zeros((batch, self.options.num_heads, width, width), jnp.float32),
        }

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        by_head = lambda value: value.reshape(*value.shape[:-1], self.options.num_heads, -1)
        before, shift = token_shift(x, context, None if state is None else state['shift'])
        stream = {name: mixed(x, before, 1 - self.mix[...][i]) for i, name in enumerate(STREAMS)}
        r, k, v = (by_head(project(stream[n], w)) for n, w in zip('rkv', (self.r_proj, self.k_proj, self.v_proj)))
        d = project(jnp.tanh(project(stream['w'], self.decay_down)), self.decay_up)
        log_decay = by_head(-math.exp(-0.5) * jax.nn.sigmoid(widened(d) + self.decay[...]))
        a = project(project(stream['a'], self.rate_down), self.rate_up)
        rate = by_head(jax.nn.sigmoid(widened(a) + self.rate[...]))
        removed = widened(k) * by_head(self.removal[...])
        removed = removed * jax.lax.rsqrt(jnp.maximum(jnp.sum(removed**2, -1, keepdims=True), SMALLEST))
        replaced = widened(k) * (1 + (rate - 1) * by_head(self.replacement[...]))
        if state is not None:  # padding leaves the state as it is; without one nobody asks for it
            real = context.mask[..., None, None]
            log_decay, rate, replaced = (jnp.where(real, value, 0) for value in (log_decay, rate, replaced))
        y, final = delta_rule(
            v,
            log_decay,
            replaced,
            r,
            removed,
            removed * rate,
            reset=context.reset,
            initial_state=None if state is None else state['memory'],
            chunk=self.options.chunk,
        )
        gate = project(jax.nn.sigmoid(project(stream['g'], self.gate_down)), self.gate_up)
        own = jnp.sum(widened(r) * by_head(self.bonus[...]) * replaced, -1, keepdims=True)
        y = self._gated(y, own, v, gate)
        return project(y, self.o_proj), None if state is None else {'shift': shift, 'memory': final}, {}

    def _gated(
        self,
        y: Float[Array, 'b t h p'],
        own: Float[Array, 'b t h one'],
        v: Float[Array, 'b t h p'],
        gate: Float[Array, 'b t i'],
    ) -> Float[Array, 'b t i']:
        eps = self.options.norm_eps

        @keeping_arguments
        def gated(y, own, v, gate, scale, bias):
            wide = over_deviation(widened(y), eps).reshape(gate.shape) * scale + bias
            wide = wide + (own * widened(v)).reshape(gate.shape)
            return (wide * widened(gate)).astype(y.dtype)

        return gated(y, own, v, gate, self.norm[...], self.norm_bias[...])
