"""RWKV-6's time mixing (Finch): a matrix state a head whose every key dimension forgets as the token says."""

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
    mixed,
    normal,
    ones,
    output_std,
    over_deviation,
    project,
    token_shift,
    uniform,
    widened,
    zeros,
)
from mixcon_jax.options import COUNT, POSITIVE, Option, above
from mixcon_jax.parallel.kernels import ssd

STREAMS = 'wkvrg'  # what is made of tokens shifted each by its own share: decay, key, value, receptance, gate
MOST = 9.0  # of d: beyond 4.7 what is left, exp(-exp(d)), is 0 in float32


class RWKV6(Layer):
    """out = (SiLU(g) * LayerNorm(o)) W_o, the norm each head's own (Peng et al., 2024, equations 11 to 20).

    o_t = r_t (S_{t-1} + diag(u) k_t^T v_t), S_t = diag(w_t) S_{t-1} + k_t^T v_t, with w_t = exp(-exp(d_t)). Each of w,
    k, v, r, g reads x_t + (x_{t-1} - x_t) m_t, with a share m_t = m + tanh(z A) B of its own, where
    z = x_t + (x_{t-1} - x_t) m_x; d_t = d + tanh(x^w A) B. Initial shares, d and u depend on the channel and on the
    layer's depth, as in the released code.
    """

    OPTIONS = {
        'rwkv6': {
            'num_heads': Option(4, 'Heads.', POSITIVE),
            'head_dim': Option(
                0,
                'Width of the receptances, keys and values of a head; 0 means dim / num_heads.',
                COUNT,
                derive=lambda model: model.dim // model.rwkv6.num_heads,
            ),
            'mix_rank': Option(32, 'Rank of what a token adds to the share of the token before.', POSITIVE),
            'decay_rank': Option(64, 'Rank of what a token adds to the decay.', POSITIVE),
            'norm_eps': Option(64e-5, 'Added to the variance in the norm of a head.', above(0.0)),
            'chunk': Option(64, 'Tokens a chunk.', POSITIVE, free=True),
        }
    }

    @staticmethod
    def check(model) -> None:
        options = model.rwkv6
        if not options.head_dim:
            divides('model.rwkv6.num_heads', options.num_heads, 'model.dim', model.dim)

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['heads'], 'model.rwkv6.num_heads', model.rwkv6.num_heads)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """Scores of a chunk's tokens, their products with values, the state's update and its reading, the bonus."""
        options = model.rwkv6
        width = options.head_dim
        return options.num_heads * (4 * min(options.chunk, seq_len) * width + 4 * width * width + 5 * width)

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """A key dimension's decays between the tokens of a block, and to the blocks' borders; again backward."""
        options = model.rwkv6
        decays = options.num_heads * options.head_dim * decays_by_key(min(options.chunk, seq_len))
        return decays, decays

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options, self.dim, self.dtype = config.rwkv6, config.dim, jnp.dtype(config.dtype)
        dim, inner, init = config.dim, self.options.num_heads * self.options.head_dim, normal(config.init_std)
        ranks, small = (self.options.mix_rank, self.options.decay_rank), uniform(0.01)
        depth, left = params.index / max(1, num_layers - 1), 1 - params.index / num_layers
        places = jnp.arange(inner) / max(1, inner - 1)
        zigzag = 0.1 * ((jnp.arange(inner) + 1) % 3 - 1)

        def shares(key, shape):
            slow, fast = ((jnp.arange(dim) / dim) ** (power * left) for power in (1, 0.5))
            return 1 - jnp.stack([slow, slow, slow + 0.3 * depth, fast, fast])

        first = lambda key, shape: 1 - (jnp.arange(dim) / dim) ** left
        self.mix_x = params('mix_x', (dim,), ('embed',), first)
        self.mix = params('mix', (len(STREAMS), dim), ('terms', 'embed'), shares, decay=False)
        self.mix_down = params('mix_down', (dim, len(STREAMS) * ranks[0]), ('embed', 'dt_rank'), zeros)
        self.mix_up = params('mix_up', (len(STREAMS), ranks[0], dim), ('terms', 'dt_rank', 'embed'), small)
        slowness = lambda key, shape: -6 + 5 * places ** (0.7 + 1.3 * depth)
        self.decay = params('decay', (inner,), ('heads',), slowness)
        self.decay_down = params('decay_down', (dim, ranks[1]), ('embed', 'dt_rank'), zeros)
        self.decay_up = params('decay_up', (ranks[1], inner), ('dt_rank', 'heads'), small)
        self.bonus = params('bonus', (inner,), ('heads',), lambda key, shape: depth * (1 - places) + zigzag)
        self.r_proj = params('r_proj', (dim, inner), ('embed', 'heads'), init)
        self.k_proj = params('k_proj', (dim, inner), ('embed', 'heads'), init)
        self.v_proj = params('v_proj', (dim, inner), ('embed', 'heads'), init)
        self.g_proj = params('g_proj', (dim, inner), ('embed', 'heads'), init)
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
        by_head = lambda value: value.reshape(*x.shape[:2], self.options.num_heads, -1)
        before, shift = token_shift(x, context, None if state is None else state['shift'])
        for_w, for_k, for_v, for_r, for_g = self._streams(x, before)
        k, v, r = map(by_head, (project(for_k, self.k_proj), project(for_v, self.v_proj), project(for_r, self.r_proj)))
        d = widened(project(jnp.tanh(project(for_w, self.decay_down)), self.decay_up)) + self.decay[...]
        log_decay = by_head(-jnp.exp(jnp.minimum(d, MOST)))
        if state is not None:  # padding leaves the state as it is; without one nobody asks for it
            real = context.mask[..., None, None]
            k, log_decay = jnp.where(real, k, 0), jnp.where(real, log_decay, 0)
        past, final = ssd(
            v,
            log_decay,
            k,
            r,
            reset=context.reset,
            initial_state=None if state is None else state['memory'],
            exclusive=True,
            chunk=self.options.chunk,
        )
        y = with_bonus(past, r, k, v, self.bonus[...].reshape(self.options.num_heads, -1))
        y = self._gated(y, project(for_g, self.g_proj))
        return project(y, self.o_proj), None if state is None else {'shift': shift, 'memory': final}, {}

    def _streams(self, x: Float[Array, 'b t d'], before: Float[Array, 'b t d']) -> list[Float[Array, 'b t d']]:
        """The tokens that w, k, v, r and g are made of."""
        low = jnp.tanh(project(mixed(x, before, 1 - self.mix_x[...]), self.mix_down))
        low = low.reshape(*x.shape[:2], len(STREAMS), -1)
        ups = self.mix_up[...].astype(x.dtype)
        return [towards(x, before, self.mix[...][i], low[:, :, i] @ ups[i]) for i in range(len(STREAMS))]

    def _gated(self, y: Float[Array, 'b t h p'], gate: Float[Array, 'b t i']) -> Float[Array, 'b t i']:
        eps = self.options.norm_eps

        @keeping_arguments
        def gated(y, gate, scale, bias):
            wide = over_deviation(widened(y), eps).reshape(gate.shape) * scale + bias
            return (wide * jax.nn.silu(widened(gate))).astype(y.dtype)

        return gated(y, gate, self.norm[...], self.norm_bias[...])


@keeping_arguments
def towards(
    x: Float[Array, 'b t d'],
    before: Float[Array, 'b t d'],
    share: Float[Array, ' d'],
    more: Float[Array, 'b t d'],
) -> Float[Array, 'b t d']:
    """x moved towards the token before by a channel's share and what the token adds to it, in x's type."""
    wide = widened(x)
    return (wide + (widened(before) - wide) * (share + more)).astype(x.dtype)


@keeping_arguments
def with_bonus(
    past: Float[Array, 'b t h p'],
    r: Float[Array, 'b t h n'],
    k: Float[Array, 'b t h n'],
    v: Float[Array, 'b t h p'],
    bonus: Float[Array, 'h n'],
) -> Float[Array, 'b t h p']:
    """What the state gives, and the token's own value by `r diag(bonus) k^T`, in the type of the first."""
    own = jnp.sum(widened(r) * bonus * widened(k), -1, keepdims=True)
    return (widened(past) + own * widened(v)).astype(past.dtype)
