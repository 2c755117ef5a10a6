"""Mamba's mixer (S6), with or without the norms on dt, B and C that Jamba and FalconMamba have."""

from jaxtyping import Array, Float

from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Aux, Parameters, State, project
from mixcon_jax.models.mixers.ssm import SelectiveSSM
from mixcon_jax.options import Option, at_least
from mixcon_jax.parallel.kernels import selective_scan


class Mamba(SelectiveSSM):
    """y = selective_scan(u) gated by SiLU(z) (Gu and Dao, 2023, §3.4)."""

    OPTIONS = {
        'mamba': {
            'norms': Option(False, 'RMSNorms on dt, B and C, as Jamba has them.'),
            'norm_scales': Option(
                True, 'Whether these norms have learned scales, as in Jamba; FalconMamba has none.', needs='norms'
            ),
            'norm_eps': Option(
                0.0,
                'Their epsilon; 0 means model.norm_eps.',
                at_least(0.0),
                derive=lambda model: model.norm_eps,
                needs='norms',
            ),
        }
    }

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        options = config.mamba
        super().__init__(config, params, num_layers, options.norms, options.norm_scales, options.norm_eps)

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        y, state = self.scanned(*self.halves(x), context, state)
        return project(y, self.out_proj), state, {}

    def scanned(
        self, u: Float[Array, 'b t i'], z: Float[Array, 'b t i'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t i'], State | None]:
        """What is between the projections: convolution, scan and gate."""
        inputs = self.inputs(u, z, context, None if state is None else state['conv'])
        y, final = selective_scan(
            inputs.u,
            inputs.dt,
            inputs.A,
            inputs.B,
            inputs.C,
            D=self.D[...],
            z=inputs.z,
            dt_bias=self.dt_bias[...],
            dt_softplus=True,
            reset=context.reset,
            initial_state=None if state is None else state['scan'],
            **self.scan_options,
        )
        if state is not None:
            state = {'conv': inputs.conv_state, 'scan': final}
        return y, state
