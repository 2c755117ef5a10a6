"""The selective state space (S6) that Mamba and Conba share: projections, short convolution, step sizes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.selective_scan import PADDED_DT
from mixcon_jax.checks import at_most, divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import (
    Parameters,
    RMSNorm,
    ShortConv,
    State,
    normal,
    ones,
    output_std,
    project,
    project_halves,
    step_sizes,
    uniform,
)
from mixcon_jax.models.published import Published, depthwise, linear, same
from mixcon_jax.options import COUNT, POSITIVE, Option, above, multiple_of, one_of

OPS_PER_STATE = 7  # decay's exponent and exp, decay times state, input times B, their sum, and C's multiply-add

WEIGHTS = {
    **{f'{name}.weight': linear(name) for name in ('in_proj', 'x_proj', 'dt_proj', 'out_proj')},
    'conv1d.weight': depthwise('conv/weight'),
    'conv1d.bias': same('conv/bias'),
    'dt_proj.bias': same('dt_bias'),
    'A_log': same('A_log'),
    'D': same('D'),
}
NORMS = {
    'dt_layernorm.weight': same('dt_norm/scale'),
    'b_layernorm.weight': same('B_norm/scale'),
    'c_layernorm.weight': same('C_norm/scale'),
}


class ScanInputs(NamedTuple):
    """Everything the selective scan takes, and the gate branch; dt is what softplus(dt + bias) makes step sizes of."""

    u: Float[Array, 'b t i']
    z: Float[Array, 'b t i']
    dt: Float[Array, 'b t i']
    A: Float[Array, 'i n']
    B: Float[Array, 'b t n']
    C: Float[Array, 'b t n']
    conv_state: Float[Array, 'b k i'] | None


class SelectiveSSM(Layer):
    """Input-dependent diagonal state space (Gu and Dao, 2023); subclasses run the scan and the gate.

    Args:
      config: ``config.model``.
      params: makes the parameters.
      num_layers: layers of the whole model, for the scale of the output projection.
      norms: put an RMSNorm on dt, B and C each, as Jamba does.
      norm_scales: whether these learn scales.
      norm_eps: their epsilon; None takes the model's.
    """

    OPTIONS = {
        'ssm': {
            'd_state': Option(16, 'States N per channel, of Mamba and Conba.', POSITIVE),
            'd_conv': Option(4, 'Width of the short causal convolution.', POSITIVE),
            'expand': Option(2, 'Inner width d_in as a multiple of dim.', POSITIVE),
            'dt_rank': Option(
                0,
                'Rank of the step-size projection; 0 means ceil(dim / 16).',
                COUNT,
                derive=lambda model: -(-model.dim // 16),
            ),
            'dt_min': Option(1e-3, 'Smallest initial step size.', above(0.0), learning=True),
            'dt_max': Option(1e-1, 'Largest initial step size.', above(0.0), learning=True),
            'dt_floor': Option(1e-4, 'Lower clamp of the initial step size.', above(0.0), learning=True),
            'implementation': Option(
                '',
                'Selective scan: "" picks the best here.',
                one_of(
                    '', 'reference', 'associative', 'chunked', 'chunked_stepped', 'chunked_associative', 'mosaic_gpu'
                ),
                free=True,
            ),
            'chunk': Option(0, 'Tokens a chunk of the selective scan; 0 picks for the platform.', COUNT, free=True),
            'keep_every': Option(
                0,
                'Tokens between the states that the GPU kernel keeps for the backward pass; 0 means one a tile, 16 as a'
                ' rule. 64: a quarter of the memory, more work.',
                multiple_of(16),
                free=True,
            ),
        }
    }
    PUBLISHED = {
        'mamba': Published('mixer', WEIGHTS),
        'falcon_mamba': Published('mixer', WEIGHTS),
        'jamba': Published('mamba', WEIGHTS | NORMS),
    }

    @staticmethod
    def check(model) -> None:
        at_most('model.ssm.dt_min', model.ssm.dt_min, 'model.ssm.dt_max', model.ssm.dt_max)

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['inner'], 'model.ssm.expand * model.dim', model.ssm.expand * model.dim)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """The scan's updates of its states."""
        return OPS_PER_STATE * model.ssm.expand * model.dim * model.ssm.d_state

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """A decay a state, and twice more backward: states are computed again, then their gradients."""
        states = float(model.ssm.expand * model.dim * model.ssm.d_state)
        return states, 2 * states

    def __init__(
        self,
        config,
        params: Parameters,
        num_layers: int,
        norms: bool,
        norm_scales: bool = True,
        norm_eps: float | None = None,
    ) -> None:
        options = config.ssm
        self.inner = options.expand * config.dim
        self.d_state = options.d_state
        self.dt_rank = options.dt_rank
        self.implementation, self.chunk = options.implementation or None, options.chunk or None
        self.keep_every = options.keep_every or None
        self.dtype = jnp.dtype(config.dtype)
        init = normal(config.init_std)
        self.make_projections(config, params, num_layers)
        self.conv = ShortConv(options.d_conv, self.inner, params.scope('conv'))
        self.x_proj = params('x_proj', (self.inner, self.dt_rank + 2 * self.d_state), ('inner', 'dt_rank'), init)
        self.dt_proj = params('dt_proj', (self.dt_rank, self.inner), ('dt_rank', 'inner'), uniform(self.dt_rank**-0.5))
        self.dt_bias = params('dt_bias', (self.inner,), ('inner',), step_sizes(options))
        self.A_log = params('A_log', (self.inner, self.d_state), ('inner', 'state'), _state_decays, decay=False)
        self.D = params('D', (self.inner,), ('inner',), ones)
        self.norms = norms
        if norms:
            eps = config.norm_eps if norm_eps is None else norm_eps
            norm = lambda name, width: RMSNorm(width, params.scope(name), eps, scale=norm_scales)
            self.dt_norm = norm('dt_norm', self.dt_rank)
            self.B_norm, self.C_norm = norm('B_norm', self.d_state), norm('C_norm', self.d_state)

    def make_projections(self, config, params: Parameters, num_layers: int) -> None:
        """Makes the matrices from the layer's width to the inner one, twice, and back."""
        init, last = normal(config.init_std), normal(output_std(config.init_std, num_layers))
        self.in_proj = params('in_proj', (config.dim, 2 * self.inner), ('embed', 'inner'), init)
        self.out_proj = params('out_proj', (self.inner, config.dim), ('inner', 'embed'), last)

    def halves(self, x: Float[Array, 'b t d']) -> tuple[Float[Array, 'b t i'], Float[Array, 'b t i']]:
        """Projects tokens to what the convolution takes, and to the gate."""
        return project_halves(x, self.in_proj, 'inner')

    @property
    def scan_options(self) -> dict[str, Any]:
        """What ``config.model.ssm`` says of how the scan runs."""
        return {'implementation': self.implementation, 'chunk': self.chunk, 'keep_every': self.keep_every}

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the constant-size state; ``max_len`` is not needed."""
        del max_len
        return {
            'conv': self.conv.init_state(batch, self.dtype),
            'scan': jnp.zeros((batch, self.inner, self.d_state), jnp.float32),
        }

    def inputs(
        self, u: Float[Array, 'b t i'], z: Float[Array, 'b t i'], context: Context, conv_state: Any
    ) -> ScanInputs:
        """Makes of ``halves`` the scan's inputs.

        A padded token gets step size 0, which leaves the state as it was, where a state comes and goes. Without one
        nobody asks for it: what follows padding begins a document, whose state is its own.
        """
        fresh = conv_state is None
        u, conv_state = self.conv(u, context, conv_state, activation='silu')
        dt, B, C = jnp.split(project(u, self.x_proj), [self.dt_rank, self.dt_rank + self.d_state], axis=-1)
        if self.norms:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt = project(dt, self.dt_proj)
        if not fresh:
            dt = jnp.where(context.mask[..., None], dt, PADDED_DT)
        return ScanInputs(u, z, dt, -jnp.exp(self.A_log[...]), B, C, conv_state)


def _state_decays(key, shape):
    """A = -(1..N) for every channel, the real S4D initialisation."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=jnp.float32)), shape)
