"""Mixture of experts: SwiGLUs, or the two matrices of Switch; softmax router, top-k, no token dropped unless asked."""

import jax
from jaxtyping import Array, Float

from mixcon_jax.checks import divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.expert_products import make_experts, matrices_of
from mixcon_jax.models.ffns.mlp import swiglu
from mixcon_jax.models.layers import Aux, Parameters, State, normal, output_std, project
from mixcon_jax.models.published import Published, experts, linear
from mixcon_jax.models.routed import Routed

WEIGHTS = {'experts.gate_up_proj': experts('w_gate', 'w_up'), 'experts.down_proj': experts('w_down')}


class MoE(Routed):
    """y = sum over the k chosen experts of p_e E_e(x) (Shazeer et al., 2017).

    With ``top_k=1``, ``expert='relu'`` and ``expert_capacity=1`` it is the layer of Switch (Fedus et al., 2021).
    """

    PUBLISHED = {
        'jamba': Published('feed_forward', WEIGHTS | {'router.weight': linear('router')}),
        'mixtral': Published('mlp', WEIGHTS | {'gate.weight': linear('router')}),
    }

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['mlp'], 'model.moe.hidden_dim', model.moe.hidden_dim)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        return 0.0

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.make_router(config, params)
        dim, width = config.dim, self.moe.hidden_dim
        first, last = normal(config.init_std), normal(output_std(config.init_std, num_layers))
        make_experts(self, params, self.moe, (dim, width, dim), first, last)
        if self.moe.shared_experts:
            wide = self.moe.shared_experts * width
            if self.moe.expert == 'swiglu':
                self.shared_gate = params('shared_gate', (dim, wide), ('embed', 'mlp'), first)
            self.shared_up = params('shared_up', (dim, wide), ('embed', 'mlp'), first)
            self.shared_down = params('shared_down', (wide, dim), ('mlp', 'embed'), last)

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        choice = self.choose(x, context)
        y, taken = self.run(x, choice, matrices_of(self))
        if self.moe.shared_experts:
            up, down = project(x, self.shared_up), self.shared_down[...].astype(x.dtype)
            swish = self.moe.expert == 'swiglu'
            y = y + (swiglu(project(x, self.shared_gate), up, down) if swish else jax.nn.relu(up) @ down)
        return y, state, self.report(choice, context, taken)
