"""Dense SwiGLU feed-forward network."""

from jaxtyping import Array, Float

from mixcon_jax.checks import divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import (
    Aux,
    Parameters,
    State,
    keeping_arguments,
    normal,
    output_std,
    project,
    swish_product,
)
from mixcon_jax.models.published import Published, linear
from mixcon_jax.options import COUNT, Option, swiglu_width

WEIGHTS = {
    'gate_proj.weight': linear('w_gate'),
    'up_proj.weight': linear('w_up'),
    'down_proj.weight': linear('w_down'),
}


class MLP(Layer):
    """down(SiLU(gate x) * up x) (Shazeer, 2020); it keeps no state."""

    OPTIONS = {
        'mlp': {
            'hidden_dim': Option(
                0,
                'Width of the SwiGLU; 0 means 8/3 dim, rounded up to a multiple of 16.',
                COUNT,
                derive=lambda model: swiglu_width(model.dim),
            )
        }
    }
    PUBLISHED = {
        'bamba': Published('feed_forward', WEIGHTS),
        'jamba': Published('feed_forward', WEIGHTS),
        'llama': Published('mlp', WEIGHTS),
    }

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['mlp'], 'model.mlp.hidden_dim', model.mlp.hidden_dim)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        return 0.0

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        width, init = config.mlp.hidden_dim, normal(config.init_std)
        self.w_gate = params('w_gate', (config.dim, width), ('embed', 'mlp'), init)
        self.w_up = params('w_up', (config.dim, width), ('embed', 'mlp'), init)
        self.w_down = params(
            'w_down', (width, config.dim), ('mlp', 'embed'), normal(output_std(config.init_std, num_layers))
        )

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        del context
        gate, up = project(x, self.w_gate), project(x, self.w_up)
        return swiglu(gate, up, self.w_down[...].astype(x.dtype)), state, {}


@keeping_arguments
def swiglu(gate: Float[Array, '*b f'], up: Float[Array, '*b f'], weight: Float[Array, 'f d']) -> Float[Array, '*b d']:
    """(SiLU(gate) * up) weight; the backward pass keeps gate and up."""
    return swish_product(gate, up) @ weight
