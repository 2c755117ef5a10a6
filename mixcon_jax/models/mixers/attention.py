"""Grouped-query attention with document masks, no positional encoding by default."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.attention import whole_tiles
from mixcon_jax.checks import ConfigError, at_most, divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import Aux, Parameters, RMSNorm, State, kept, normal, output_std, project, zeros
from mixcon_jax.models.published import Published, linear
from mixcon_jax.models.rotary import rotate
from mixcon_jax.options import COUNT, POSITIVE, Option, above, at_least
from mixcon_jax.parallel.kernels import attention


class Attention(Layer):
    """Causal attention (Ainslie et al., 2023, for the grouped heads); its state is a preallocated cache."""

    OPTIONS = {
        'attention': {
            'num_heads': Option(4, 'Query heads.', POSITIVE),
            'num_kv_heads': Option(2, 'Key and value heads; divides num_heads.', POSITIVE),
            'head_dim': Option(
                0,
                'Width of a head; 0 means dim / num_heads.',
                COUNT,
                derive=lambda model: model.dim // model.attention.num_heads,
            ),
            'rope': Option(False, 'Rotary position embedding; off means no positional encoding.'),
            'rope_theta': Option(10000.0, 'Base of the rotary frequencies.', above(0.0), needs='rope'),
            'rope_dim': Option(0, 'Channels of a head that rotate, its first; 0 means all.', COUNT, needs='rope'),
            'window': Option(
                0, 'Tokens that a query sees, itself included; 0 means all of its document. The cache holds all.', COUNT
            ),
            'qk_norm': Option(False, 'RMSNorms on the queries and the keys of a head, before rotation.'),
            'logit_cap': Option(0.0, 'Scores become cap * tanh(score / cap); 0 leaves them.', at_least(0.0)),
            'sinks': Option(False, 'A learned score a head that takes part in the softmax and has no value.'),
            'block_size': Option(
                0,
                'Queries and keys a tile of the portable blockwise attention; 0 picks for the platform.',
                COUNT,
                free=True,
            ),
        }
    }
    PUBLISHED = dict.fromkeys(
        ('bamba', 'jamba', 'llama', 'mixtral'),
        Published('self_attn', {f'{name}.weight': linear(name) for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj')}),
    )

    @staticmethod
    def check(model) -> None:
        options = model.attention
        divides('model.attention.num_kv_heads', options.num_kv_heads, 'model.attention.num_heads', options.num_heads)
        if not options.head_dim:
            divides('model.attention.num_heads', options.num_heads, 'model.dim', model.dim)
        head_dim = options.head_dim or model.dim // options.num_heads
        at_most('model.attention.rope_dim', options.rope_dim, 'model.attention.head_dim', head_dim)
        name, width = ('rope_dim', options.rope_dim) if options.rope_dim else ('head_dim', head_dim)
        if options.rope and width % 2:
            raise ConfigError(f'model.attention.{name}={width} must be even when model.attention.rope is on')

    @staticmethod
    def check_split(model, shards) -> None:
        for name in ('num_heads', 'num_kv_heads'):
            divides('mesh.tensor', shards['heads'], f'model.attention.{name}', model.attention[name])

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """Scores and their sum of values, over ``seq_len / 2`` keys in the mean, or those that a window leaves."""
        return 4 * model.attention.head_dim * cls._scores(model, seq_len)

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """Each score's, computed again by the backward pass."""
        scores = cls._scores(model, seq_len)
        return scores, scores

    @staticmethod
    def _scores(model, seq_len: int) -> float:
        """Scores of a token, of all heads, in the mean."""
        window = min(model.attention.window or seq_len, seq_len)
        return model.attention.num_heads * window * (1 - window / (2 * seq_len))

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options = options = config.attention
        self.head_dim = options.head_dim
        self.block_size = options.block_size or None
        self.dtype = jnp.dtype(config.dtype)
        q_width, kv_width = options.num_heads * self.head_dim, options.num_kv_heads * self.head_dim
        init = normal(config.init_std)
        self.q_proj = params('q_proj', (config.dim, q_width), ('embed', 'heads'), init)
        self.k_proj = params('k_proj', (config.dim, kv_width), ('embed', 'kv_heads'), init)
        self.v_proj = params('v_proj', (config.dim, kv_width), ('embed', 'kv_heads'), init)
        self.o_proj = params(
            'o_proj', (q_width, config.dim), ('heads', 'embed'), normal(output_std(config.init_std, num_layers))
        )

        if options.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, params.scope('q_norm'), config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, params.scope('k_norm'), config.norm_eps)
        if options.sinks:
            self.sinks = params('sinks', (options.num_heads,), ('heads',), zeros)

    @property
    def more(self) -> dict[str, Any]:
        """What ``config.model.attention`` asks of the softmax."""
        sinks = self.sinks[...] if self.options.sinks else None
        return {'window': self.options.window or None, 'logit_cap': self.options.logit_cap or None, 'sinks': sinks}

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns an empty cache of ``max_len`` tokens a row, rounded up to whole tiles, which need no padding.

        A token's heads lie side by side, [B, max_len, K * d], as decoding reads them: a cache that is reshaped between
        its update and its use is copied by XLA at every token.
        """
        max_len = whole_tiles(max_len, self.block_size)
        shape = (batch, max_len, self.options.num_kv_heads * self.head_dim)
        places = {'positions': jnp.zeros((batch, max_len), jnp.int32)} if self.options.window else {}
        return places | {
            'k': jnp.zeros(shape, self.dtype),
            'v': jnp.zeros(shape, self.dtype),
            'segment_ids': jnp.zeros((batch, max_len), jnp.int32),
            'length': jnp.zeros((), jnp.int32),
        }

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        """Attends to this call's tokens and, with a state, to all before them; the cache must have room for T more."""
        q = self._heads(project(x, self.q_proj), self.options.num_heads)
        k = self._heads(project(x, self.k_proj), self.options.num_kv_heads)
        v = self._heads(project(x, self.v_proj), self.options.num_kv_heads)
        if self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.options.rope:
            turned = lambda heads: rotate(heads, context.positions, self.options.rope_theta, self.options.rope_dim)
            q, k = turned(q), turned(k)
        if state is None:
            q, k, v = kept(q), kept(k), kept(v)
            y = attention(q, k, v, segment_ids=context.segment_ids, block_size=self.block_size, **self.more)
        else:
            start = state['length']
            write = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(
                cache, new.astype(cache.dtype), start, axis=1
            )
            places = {'positions': write(state['positions'], context.positions)} if self.options.window else {}
            state = places | {
                'k': write(state['k'], k.reshape(*k.shape[:2], -1)),
                'v': write(state['v'], v.reshape(*v.shape[:2], -1)),
                'segment_ids': write(state['segment_ids'], context.segment_ids),
                'length': start + x.shape[1],
            }
            y = attention(
                q,
                self._heads(state['k'], self.options.num_kv_heads),
                self._heads(state['v'], self.options.num_kv_heads),
                segment_ids=context.segment_ids,
                kv_segment_ids=state['segment_ids'],
                q_offset=start,
                block_size=self.block_size,
                positions=context.positions if places else None,
                kv_positions=state.get('positions'),
                **self.more,
            )
        return project(y.reshape(*x.shape[:2], -1).astype(x.dtype), self.o_proj), state, {}

    def _heads(self, x: Float[Array, 'b t w'], count: int) -> Float[Array, 'b t h p']:
        return x.reshape(*x.shape[:2], count, self.head_dim)
