"""What layers with experts share: their options, the router, room for tokens, losses and statistics."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixcon_jax.checks import at_most, divides, not_apart
from mixcon_jax.models.context import Context
from mixcon_jax.models.expert_products import MATRICES, Matrices, weighted_sum
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import Aux, Buffer, Loss, Parameters, kept, masked_mean, normal, real_tokens, widened
from mixcon_jax.options import COUNT, POSITIVE, Option, Statistic, at_least, one_of, swiglu_width
from mixcon_jax.parallel import experts
from mixcon_jax.parallel.apart import total
from mixcon_jax.parallel.layout import constrain
from mixcon_jax.parallel.split import TOKENS, by_parts

TITLE = 'experts: share of tokens'  # of the statistics' table
METHODS = ('padded', 'ragged')  # those of parallel.expert_parallel


class Choice(NamedTuple):
    """What a router says of every token.

    Attributes:
      logits: of all experts.
      probabilities: likewise.
      chosen: the experts that each token chose, all different.
      weights: what their results are weighted with; 0 where none takes the token.
      taken: whether the expert takes the token: it is no padding, and finds room.
    """

    logits: Float[Array, 'b t e']
    probabilities: Float[Array, 'b t e']
    chosen: Int[Array, 'b t k']
    weights: Float[Array, 'b t k']
    taken: Bool[Array, 'b t k']


class Routed(Layer):
    """A layer whose tokens choose experts (Shazeer et al., 2017; Fedus et al., 2021, for losses and capacity).

    The weights are the router's probabilities, not renormalised unless asked. With ``balance='bias'`` a bias that no
    gradient trains is added to the scores for the choice alone (Wang et al., 2024). A token that finds no room in its
    expert gets 0 from it, so that the layer's residual passes it on; it is no expert's to run.
    """

    OPTIONS = {
        'moe': {
            'num_experts': Option(4, 'Experts.', POSITIVE),
            'top_k': Option(2, 'Experts a token uses.', POSITIVE),
            'hidden_dim': Option(
                0,
                "Width of one expert; 0 means the mlp's width / top_k.",
                COUNT,
                derive=lambda model: max(1, (model.mlp.hidden_dim or swiglu_width(model.dim)) // model.moe.top_k),
            ),
            'expert': Option(
                'swiglu',
                'What an expert is: SwiGLU, of three matrices, or W_2 max(W_1 x, 0), "relu", as in Switch.',
                one_of('swiglu', 'relu'),
            ),
            'shared_experts': Option(
                0, 'Experts that every token passes besides, added with weight 1: one MLP of that many widths.', COUNT
            ),
            'renormalize': Option(False, 'Scale the chosen weights to sum to one, as Mixtral does.'),
            'balance': Option(
                'loss',
                'How load is balanced: by a loss, by a bias on the routing, or not.',
                one_of('none', 'loss', 'bias'),
                learning=True,
            ),
            'balance_coef': Option(1e-2, 'Weight of the balance loss.', at_least(0.0), learning=True),
            'router_z_coef': Option(0.0, "Weight of the router's z-loss.", at_least(0.0), learning=True),
            'bias_rate': Option(1e-3, 'Step of the routing bias with balance="bias".', at_least(0.0), learning=True),
            'expert_capacity': Option(
                0.0,
                "Tokens that an expert takes in training, as a multiple of an even share of the microbatch's; the last"
                ' ones beyond it are dropped, as in Switch, on every mesh the same. 0 takes all.',
                at_least(0.0),
                learning=True,
            ),
            'implementation': Option(
                '',
                'Expert products: "" picks; dense runs every expert, grouped sorts tokens, single takes one token and'
                ' expert after another, as few tokens do on a CPU.',
                one_of('', 'dense', 'grouped', 'single'),
                free=True,
            ),
            'exchange': Option(
                '',
                'How tokens reach experts on other devices (mesh.expert): in parts of one size, "padded", or as many as'
                ' there are, "ragged", which no GPU has run yet and CPUs cannot; "" is padded.',
                one_of('', *METHODS),
                free=True,
            ),
            'capacity': Option(
                0.0,
                'Room for exchanged tokens as a multiple of what an even load takes; beyond it they are dropped. 0 is'
                ' room for all.',
                at_least(0.0),
                learning=True,
            ),
            'group_block': Option(
                0, 'Rows a block of the portable grouped product; 0 picks for the platform.', COUNT, free=True
            ),
        }
    }
    STATISTICS = {
        'moe_load': Statistic('Share of the choices that went to each expert.', TITLE, 'shares'),
        'moe_entropy': Statistic('Entropy of the router, in nats.', TITLE, 'aside', 'entropy'),
        'moe_dropped': Statistic('Share of the choices that no expert took.', TITLE, 'exception', 'dropped'),
    }

    @staticmethod
    def check(model) -> None:
        at_most(
            'model.moe.top_k', model.moe.top_k, 'model.moe.num_experts', model.moe.num_experts, 'choose at most all'
        )

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.expert', shards['experts'], 'model.moe.num_experts', model.moe.num_experts)
        not_apart(shards, 'model.moe.expert_capacity', model.moe.expert_capacity)

    @classmethod
    def active_share(cls, model, parameter: str) -> float:
        """Of the experts' weights, those of the chosen ones."""
        return model.moe.top_k / model.moe.num_experts if parameter.split('/')[-1] in MATRICES else 1.0

    def make_router(self, config, params: Parameters) -> None:
        """Gives the layer its options and its router."""
        self.moe, count = config.moe, config.moe.num_experts
        self.router = params('router', (config.dim, count), ('embed', 'experts'), normal(config.init_std))
        if self.moe.balance == 'bias':
            self.router_bias = Buffer(jnp.zeros((count,)), logical_axes=('experts',))

    def choose(self, x: Float[Array, 'b t d'], context: Context) -> Choice:
        """Routes tokens by their features."""
        options = self.moe
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
        taken = jnp.broadcast_to(context.mask[..., None], chosen.shape)
        if options.expert_capacity and context.train:
            taken = taken & _within(chosen, context.mask, options.expert_capacity, options.num_experts)
        return Choice(logits, probabilities, chosen, jnp.where(taken, weights, 0), taken)

    def run(
        self, x: Float[Array, 'b t d'], choice: Choice, matrices: Matrices
    ) -> tuple[Float[Array, 'b t o'], Bool[Array, 'b t k']]:
        """The weighted sum of each token's experts, and which choices were taken.

        Args:
          x: what the experts read.
          choice: which of them.
          matrices: theirs, in any type; products are of x's.
        """
        return weighted_sum(x, choice.chosen, choice.weights, choice.taken, matrices, self.moe)

    def report(self, choice: Choice, context: Context, taken: Bool[Array, 'b t k']) -> Aux:
        """Losses and statistics over the real tokens.

        Balance loss: E sum_i f_i p_i with f_i the share of (token, choice) pairs that chose expert i, room or not, and
        p_i its mean probability; it is 1 when balanced, E / top_k when collapsed. z-loss: mean of logsumexp(logits)^2.
        """
        options, mask, probabilities = self.moe, context.mask[..., None], choice.probabilities
        num_experts, count = options.num_experts, real_tokens(context)
        picks = jax.nn.one_hot(choice.chosen, num_experts, dtype=probabilities.dtype).sum(axis=2)
        routed = total(jnp.sum(jnp.where(mask, picks, 0), axis=(0, 1)))
        pairs = count * options.top_k
        load = routed / pairs
        mean = total(jnp.sum(jnp.where(mask, probabilities, 0), axis=(0, 1))) / count
        entropy = -jnp.sum(probabilities * jnp.log(jnp.maximum(probabilities, 1e-30)), axis=-1)
        stats = {
            'moe_load': load,
            'moe_entropy': masked_mean(entropy, context),
            'moe_dropped': total(jnp.sum(mask & ~taken, dtype=jnp.int32)) / pairs,
        }
        balance = num_experts * jnp.sum(jax.lax.stop_gradient(load) * mean)
        router_z = masked_mean(jax.nn.logsumexp(choice.logits, axis=-1) ** 2, context)
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
        step = self.moe.bias_rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
        return {**buffers, 'router_bias': buffers['router_bias'] + step}


def _of_chosen(values: Float[Array, 'b t e'], chosen: Int[Array, 'b t k']) -> Float[Array, 'b t k']:
    """The chosen experts' values: by a mask, for the gradient of indexing is a scatter."""
    is_chosen = chosen[..., None] == jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(is_chosen, values[..., None, :], 0), axis=-1)


def _within(
    chosen: Int[Array, 'b t k'], mask: Bool[Array, 'b t'], capacity: float, num_experts: int
) -> Bool[Array, 'b t k']:
    """Which choices are among the first of their expert: ``capacity`` times an even share, rounded down, or one.

    Of the tokens of the whole mesh: row after row, so that no token's room depends on a later one of its row.
    """
    chosen, mask = constrain(chosen, None, None, None), constrain(mask, None, None)
    pairs = mask.sum() * chosen.shape[2]
    # A hair more: a share that is a whole number is not to become one less by rounding.
    room = jnp.maximum(1, jnp.floor(pairs.astype(jnp.float32) * (capacity / num_experts * (1 + 1e-6))))
    owner = jnp.where(mask[..., None], chosen, num_experts).reshape(-1, chosen.shape[2])
    found = experts.order(owner, num_experts)
    before = (jnp.cumsum(found.group_sizes) - found.group_sizes)[chosen]
    return found.rows.reshape(chosen.shape) - before < room
