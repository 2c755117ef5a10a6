"""Mixture of SwiGLU experts: softmax router, top-k, dropless unless room for exchanged tokens is limited."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import platform
from kernels_pallas.grouped_matmul import grouped_matmul
from mixcon_jax.checks import ConfigError, at_most, divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.ffns.mlp import swiglu
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import (
    Aux,
    Buffer,
    Loss,
    Parameters,
    State,
    gated,
    kept,
    masked_mean,
    normal,
    output_std,
    project,
    widened,
)
from mixcon_jax.models.published import Published, linear
from mixcon_jax.models.published import experts as stacked
from mixcon_jax.options import COUNT, POSITIVE, Option, Statistic, at_least, one_of
from mixcon_jax.parallel import expert_parallel, experts
from mixcon_jax.parallel.layout import constrain
from mixcon_jax.parallel.split import axes_of, by_parts, shards_of

TITLE = 'experts: share of tokens'  # of the statistics' table
METHODS = ('padded', 'ragged')  # those of parallel.expert_parallel
DENSE_TOKENS = 64  # up to here running every expert is cheaper than sorting
TOKENS = {'b': 'batch', 't': 'sequence'}  # what devices share out: no token needs another's experts
DIMS = {
    'x': 'b t d', 'chosen': 'b t k', 'weights': 'b t k', 'mask': 'b t',
    'w_gate': 'e d f', 'w_up': 'e d f', 'w_down': 'e f d',
}  # fmt: skip

WEIGHTS = {'experts.gate_up_proj': stacked('w_gate', 'w_up'), 'experts.down_proj': stacked('w_down')}


class MoE(Layer):
    """y = sum over the k chosen experts of p_e E_e(x) (Shazeer et al., 2017; Fedus et al., 2021, for the losses).

    The weights are the router's probabilities, not renormalised unless asked. With ``balance='bias'`` a bias that no
    gradient trains is added to the scores for the choice alone (Wang et al., 2024). No token is dropped, but where
    devices share the experts and ``capacity`` limits what they send one another.
    """

    OPTIONS = {
        'moe': {
            'num_experts': Option(4, 'Experts.', POSITIVE),
            'top_k': Option(2, 'Experts a token uses.', POSITIVE),
            'hidden_dim': Option(
                0,
                "Width of one expert; 0 means the mlp's width / top_k.",
                COUNT,
                derive=lambda model: max(1, model.mlp.hidden_dim // model.moe.top_k),
            ),
            'shared_experts': Option(
                0, 'Experts that every token passes besides, added with weight 1: one MLP of that many widths.', COUNT
            ),
            'renormalize': Option(False, 'Scale the chosen weights to sum to one, as Mixtral does.'),
            'balance': Option(
                'loss',
                'How load is balanced: by a loss, by a bias on the routing, or not.',
                one_of('none', 'loss', 'bias'),
            ),
            'balance_coef': Option(1e-2, 'Weight of the balance loss.', at_least(0.0)),
            'router_z_coef': Option(0.0, "Weight of the router's z-loss.", at_least(0.0)),
            'bias_rate': Option(1e-3, 'Step of the routing bias with balance="bias".', at_least(0.0)),
            'implementation': Option(
                '',
                'Expert products: "" picks; dense runs every expert, grouped sorts tokens.',
                one_of('', 'dense', 'grouped'),
            ),
            'exchange': Option(
                '',
                'How tokens reach experts on other devices (mesh.expert): in parts of one size, "padded", or as many as'
                ' there are, "ragged", which no GPU has run yet and CPUs cannot; "" is padded.',
                one_of('', *METHODS),
            ),
            'capacity': Option(
                0.0,
                'Room for exchanged tokens as a multiple of what an even load takes; beyond it they are dropped. 0 is'
                ' room for all.',
                at_least(0.0),
            ),
            'group_block': Option(0, 'Rows a block of the portable grouped product; 0 picks for the platform.', COUNT),
        }
    }
    STATISTICS = {
        'moe_load': Statistic('Share of the choices that went to each expert.', TITLE, 'shares'),
        'moe_entropy': Statistic('Entropy of the router, in nats.', TITLE, 'aside', 'entropy'),
        'moe_dropped': Statistic('Share of the choices that no expert took.', TITLE, 'exception', 'dropped'),
    }
    PUBLISHED = {
        'jamba': Published('feed_forward', WEIGHTS | {'router.weight': linear('router')}),
        'mixtral': Published('mlp', WEIGHTS | {'gate.weight': linear('router')}),
    }

    @staticmethod
    def check(model) -> None:
        at_most(
            'model.moe.top_k', model.moe.top_k, 'model.moe.num_experts', model.moe.num_experts, 'choose at most all'
        )

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.expert', shards['experts'], 'model.moe.num_experts', model.moe.num_experts)
        divides('mesh.tensor', shards['mlp'], 'model.moe.hidden_dim', model.moe.hidden_dim)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        return 0.0

    @classmethod
    def active_share(cls, model, parameter: str) -> float:
        """Of the experts' weights, those of the chosen ones."""
        return model.moe.top_k / model.moe.num_experts if parameter in ('w_gate', 'w_up', 'w_down') else 1.0

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options = options = config.moe
        count, dim = options.num_experts, config.dim
        width, init = options.hidden_dim, normal(config.init_std)
        self.router = params('router', (dim, count), ('embed', 'experts'), init)
        self.w_gate = params('w_gate', (count, dim, width), ('experts', 'embed', 'mlp'), init)
        self.w_up = params('w_up', (count, dim, width), ('experts', 'embed', 'mlp'), init)
        self.w_down = params(
            'w_down',
            (count, width, dim),
            ('experts', 'mlp', 'embed'),
            normal(output_std(config.init_std, num_layers)),
        )
        if options.shared_experts:
            wide = options.shared_experts * width
            self.shared_gate = params('shared_gate', (dim, wide), ('embed', 'mlp'), init)
            self.shared_up = params('shared_up', (dim, wide), ('embed', 'mlp'), init)
            self.shared_down = params(
                'shared_down', (wide, dim), ('mlp', 'embed'), normal(output_std(config.init_std, num_layers))
            )
        if options.balance == 'bias':
            self.router_bias = Buffer(jnp.zeros((count,)), logical_axes=('experts',))

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        options = self.options
        # Full precision also where float32 products are rounded by default: near ties decide which expert runs.
        router = constrain(self.router[...], None, None)
        logits = kept(jnp.matmul(widened(x), router, precision=jax.lax.Precision.HIGHEST))
        probabilities = jax.nn.softmax(logits, axis=-1)
        scores = probabilities + self.router_bias[...] if options.balance == 'bias' else probabilities
        # XLA would gather the scores of all devices for this, too.
        best = lambda scores: jax.lax.top_k(scores, options.top_k)[1]
        chosen = by_parts(best, {'scores': jax.lax.stop_gradient(scores)}, {'scores': 'b t e'}, 'b t k', TOKENS)
        if options.renormalize:
            # p / sum(p) of the chosen, from their logits: the p may all be 0 in float32 where the bias has chosen.
            weights = jax.nn.softmax(_of_chosen(logits, chosen), axis=-1)
        else:
            weights = _of_chosen(probabilities, chosen)
        weights = jnp.where(context.mask[..., None], weights, 0)

        tokens = x.shape[0] * x.shape[1]
        dense = options.implementation == 'dense' or (not options.implementation and tokens <= DENSE_TOKENS)
        matrices = {name: getattr(self, name).astype(x.dtype) for name in ('w_gate', 'w_up', 'w_down')}
        if dense:
            y, taken = self._dense(x, chosen, weights, **matrices), None
        else:
            arrays = {'x': x, 'chosen': chosen, 'weights': weights, 'mask': context.mask} | matrices
            y, taken = self._on_devices(arrays)
        if options.shared_experts:
            gate, up = project(x, self.shared_gate), project(x, self.shared_up)
            y = y + swiglu(gate, up, self.shared_down[...].astype(x.dtype))
        return y, state, self._aux(logits, probabilities, chosen, context, taken)

    def _dense(
        self,
        x: Float[Array, 'b t d'],
        chosen: Int[Array, 'b t k'],
        weights: Float[Array, 'b t k'],
        w_gate: Float[Array, 'e d f'],
        w_up: Float[Array, 'e d f'],
        w_down: Float[Array, 'e f d'],
    ) -> Float[Array, 'b t d']:
        """Runs every expert on every token: the smallest form, for few tokens and as an oracle."""
        one_hot = jax.nn.one_hot(chosen, self.options.num_experts, dtype=weights.dtype)
        mix = jnp.einsum('btk,btke->bte', weights, one_hot).astype(x.dtype)
        gate, up = (kept(jnp.einsum('btd,edf->btef', x, weight)) for weight in (w_gate, w_up))
        return jnp.einsum('btef,bte,efd->btd', gated(gate, up), mix, w_down)

    def _on_devices(self, arrays: Mapping[str, Array]) -> tuple[Float[Array, 'b t d'], Bool[Array, 'b t k'] | None]:
        """Runs the experts that tokens chose, each device those that it has, and tells which choices were taken."""
        count, _, width = arrays['w_gate'].shape
        axes: dict[str, str] = dict(TOKENS)
        summed: tuple[str, ...] = ()
        if shards_of('mlp', width) > 1:  # devices along these axes have a part of every expert's width
            axes['f'], summed = 'mlp', axes_of('mlp')
        if shards_of('experts', count) > 1 and shards_of('batch', len(arrays['x'])) > 1:
            run = functools.partial(self._exchanged, summed=summed)
            return by_parts(run, arrays, DIMS, ('b t d', 'b t k'), axes | {'e': 'experts'})
        return by_parts(functools.partial(self._grouped, summed=summed), arrays, DIMS, 'b t d', axes), None

    def _grouped(
        self,
        x: Float[Array, 'b t d'],
        chosen: Int[Array, 'b t k'],
        weights: Float[Array, 'b t k'],
        mask: Bool[Array, 'b t'],
        w_gate: Float[Array, 'e d f'],
        w_up: Float[Array, 'e d f'],
        w_down: Float[Array, 'e f d'],
        summed: tuple[str, ...] = (),
    ) -> Float[Array, 'b t d']:
        """Sorts (token, choice) pairs by expert and multiplies each group by its expert; padding sorts last."""
        batch, length, dim = x.shape
        owner = jnp.where(mask[..., None], chosen, self.options.num_experts)
        order = experts.order(owner.reshape(batch * length, -1), self.options.num_experts)
        rows = self._products(experts.dispatch(x.reshape(-1, dim), order), order.group_sizes, w_gate, w_up, w_down)
        y = experts.combine(rows, weights.reshape(batch * length, -1), order).reshape(x.shape)
        return jax.lax.psum(y, summed) if summed else y

    def _exchanged(
        self,
        x: Float[Array, 'b t d'],
        chosen: Int[Array, 'b t k'],
        weights: Float[Array, 'b t k'],
        mask: Bool[Array, 'b t'],
        w_gate: Float[Array, 'e d f'],
        w_up: Float[Array, 'e d f'],
        w_down: Float[Array, 'e f d'],
        summed: tuple[str, ...],
    ) -> tuple[Float[Array, 'b t d'], Bool[Array, 'b t k']]:
        """``_grouped`` where this device has its own tokens, and experts of its own."""
        options = self.options
        across = tuple(axis for axis in axes_of('experts') if jax.lax.axis_size(axis) > 1)
        if options.exchange == 'ragged' and (platform.platform() != 'gpu' or len(across) > 1):
            where = f'experts split over {" and ".join(across)}' if len(across) > 1 else platform.platform()
            raise ConfigError(
                f"model.moe.exchange='ragged' is for GPUs, and for experts split over one mesh axis, not for {where};"
                " choose 'padded'"
            )
        owner = jnp.where(mask[..., None], chosen, options.num_experts)
        y, taken = expert_parallel.run(
            x.reshape(-1, x.shape[-1]),
            owner.reshape(-1, owner.shape[-1]),
            weights.reshape(-1, owner.shape[-1]),
            lambda rows, sizes: self._products(rows, sizes, w_gate, w_up, w_down),
            axes=across,
            num_experts=options.num_experts,
            capacity=options.capacity,
            method=options.exchange or 'padded',
            keep=kept,
        )
        y = jax.lax.psum(y, summed) if summed else y
        return y.reshape(x.shape), taken.reshape(chosen.shape)

    def _products(
        self,
        rows: Float[Array, 'm d'],
        group_sizes: Int[Array, ' e'],
        w_gate: Float[Array, 'e d f'],
        w_up: Float[Array, 'e d f'],
        w_down: Float[Array, 'e f d'],
    ) -> Float[Array, 'm d']:
        """Each group of rows through its expert."""
        product = functools.partial(grouped_matmul, group_sizes=group_sizes, block=self.options.group_block or None)
        # One product for both: XLA writes them side by side as it converts them.
        gate, up = jnp.split(kept(product(rows, jnp.concatenate([w_gate, w_up], axis=-1))), 2, axis=-1)
        return kept(product(gated(gate, up), w_down))

    def _aux(
        self,
        logits: Float[Array, 'b t e'],
        probabilities: Float[Array, 'b t e'],
        chosen: Int[Array, 'b t k'],
        context: Context,
        taken: Bool[Array, 'b t k'] | None = None,
    ) -> Aux:
        """Losses and statistics over the real tokens.

        Balance loss: E sum_i f_i p_i with f_i the share of (token, choice) pairs that went to expert i and p_i its mean
        probability; it is 1 when balanced, E / top_k when collapsed. z-loss: mean of logsumexp(logits)^2.
        """
        num_experts, mask = self.options.num_experts, context.mask[..., None]
        count = jnp.maximum(context.mask.sum(), 1)
        picks = jax.nn.one_hot(chosen, num_experts, dtype=probabilities.dtype).sum(axis=2)
        routed = jnp.sum(jnp.where(mask, picks, 0), axis=(0, 1))
        pairs = count * self.options.top_k
        load = routed / pairs
        mean = jnp.sum(jnp.where(mask, probabilities, 0), axis=(0, 1)) / count
        left_out = 0 if taken is None else jnp.sum(mask & ~taken, dtype=jnp.int32)
        entropy = -jnp.sum(probabilities * jnp.log(jnp.maximum(probabilities, 1e-30)), axis=-1)
        stats = {
            'moe_load': load,
            'moe_entropy': masked_mean(entropy, context),
            'moe_dropped': left_out / pairs,  # share of the pairs that no expert took
        }
        options = self.options
        balance = num_experts * jnp.sum(jax.lax.stop_gradient(load) * mean)
        router_z = masked_mean(jax.nn.logsumexp(logits, axis=-1) ** 2, context)
        losses = {
            'balance': Loss(balance, options.balance_coef if options.balance == 'loss' else 0.0),
            'router_z': Loss(router_z, options.router_z_coef),
        }
        return {'losses': losses, 'stats': jax.tree.map(jax.lax.stop_gradient, stats)}

    def update_buffers(self, buffers: Mapping[str, Any], stats: Mapping[str, Array]) -> Mapping[str, Any]:
        """Moves the routing bias towards the experts that got less than their share (Wang et al., 2024)."""
        if 'router_bias' not in buffers:
            return buffers
        load = stats['moe_load']
        step = self.options.bias_rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
        return {**buffers, 'router_bias': buffers['router_bias'] + step}


def _of_chosen(values: Float[Array, 'b t e'], chosen: Int[Array, 'b t k']) -> Float[Array, 'b t k']:
    """The chosen experts' values: by a mask, for the gradient of indexing is a scatter."""
    is_chosen = chosen[..., None] == jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(is_chosen, values[..., None, :], 0), axis=-1)
