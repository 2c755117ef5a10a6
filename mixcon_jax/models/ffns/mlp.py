"""Dense SwiGLU feed-forward network."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Aux, Parameters, State, normal, output_std, project


def mlp_hidden_dim(config) -> int:
    """Returns the MLP's width: as given, or 8/3 dim rounded up to a multiple of 16."""
    return config.mlp.hidden_dim or -(-8 * config.dim // 48) * 16


class MLP(nnx.Module):
    """down(SiLU(gate x) * up x) (Shazeer, 2020); it keeps no state."""

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        width, init = mlp_hidden_dim(config), normal(config.init_std)
        self.w_gate = params('w_gate', (config.dim, width), ('embed', 'mlp'), init)
        self.w_up = params('w_up', (config.dim, width), ('embed', 'mlp'), init)
        self.w_down = params(
            'w_down', (width, config.dim), ('mlp', 'embed'), normal(output_std(config.init_std, num_layers))
        )

    def init_state(self, batch: int, max_len: int) -> State:
        del batch, max_len
        return {}

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        del context
        hidden = jax.nn.silu(project(x, self.w_gate)) * project(x, self.w_up)
        return project(hidden, self.w_down), state, {}
