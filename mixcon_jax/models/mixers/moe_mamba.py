"""Mamba's mixer with experts in the place of its projections."""

from jaxtyping import Array, Float

from mixcon_jax.checks import ConfigError, divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.expert_products import Experts, matrices_of
from mixcon_jax.models.layers import Aux, Parameters, State, normal, output_std, project
from mixcon_jax.models.mixers.mamba import Mamba
from mixcon_jax.models.routed import Routed
from mixcon_jax.options import COUNT, Check, Option

PROJECTIONS = ('conv', 'gate', 'output')


class MoEMamba(Mamba, Routed):
    """Mamba with a layer of experts for each projection that is named (Pióro et al., 2024, "inner MoE").

    In place of W x there is sum over the k chosen experts of p_e E_e(x), for what the convolution takes, for the gate,
    or for the output. One router, which reads the layer's input, chooses for all of them; the paper's code has a router
    each. ``model.moe`` has the router's options and says what an expert is, which the paper has as in Switch,
    ``expert='relu'``; of its width it says nothing: by default an expert has as many weights as the matrix whose place
    it takes. No published checkpoint has it.
    """

    OPTIONS = {
        'moe_mamba': {
            'projections': Option(
                ('gate',),
                'Which projections experts take the place of: of what goes to the convolution, "conv", of the "gate",'
                ' of the "output".',
                Check(
                    lambda value: 0 < len(value) == len(set(value) & set(PROJECTIONS)),
                    'some of conv, gate, output, each once',
                ),
                element=str,
            ),
            'hidden_dim': Option(
                0,
                'Width of one of their experts; 0 means that at which two matrices have the weights of the projection,'
                ' or the multiple of 64 below.',
                COUNT,
                derive=lambda model: max(
                    1,
                    model.ssm.expand * model.dim // (model.ssm.expand + 1) // 64 * 64
                    or model.ssm.expand * model.dim // (model.ssm.expand + 1),
                ),
            ),
        }
    }
    PUBLISHED = {}

    @staticmethod
    def check(model) -> None:
        if shared := model.moe.shared_experts:
            raise ConfigError(
                f'model.moe.shared_experts={shared} has no meaning for moe_mamba; set it to 0, or for the moe layers'
                ' alone in a group of their own, model.layers.NAME'
            )

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['mlp'], 'model.moe_mamba.hidden_dim', model.moe_mamba.hidden_dim)

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.replaced = tuple(config.moe_mamba.projections)
        self.make_router(config, params)
        super().__init__(config, params, num_layers)

    def make_projections(self, config, params: Parameters, num_layers: int) -> None:
        dim, inner, width = config.dim, self.inner, config.moe_mamba.hidden_dim
        first, last = normal(config.init_std), normal(output_std(config.init_std, num_layers))
        bank = lambda name, ends, last: Experts(params.scope(name), config.moe, (ends[0], width, ends[1]), first, last)
        single = lambda name: params(name, (dim, inner), ('embed', 'inner'), first)
        if not {'conv', 'gate'} & set(self.replaced):
            self.in_proj = params('in_proj', (dim, 2 * inner), ('embed', 'inner'), first)
        elif 'conv' not in self.replaced:
            self.conv_proj = single('conv_proj')
        elif 'gate' not in self.replaced:
            self.gate_proj = single('gate_proj')
        if 'conv' in self.replaced:
            self.conv_experts = bank('conv_experts', (dim, inner), first)
        if 'gate' in self.replaced:
            self.gate_experts = bank('gate_experts', (dim, inner), first)
        if 'output' in self.replaced:
            self.output_experts = bank('output_experts', (inner, dim), last)
        else:
            self.out_proj = params('out_proj', (inner, dim), ('inner', 'embed'), last)

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        choice = self.choose(x, context)
        taken = choice.taken

        def through(experts: Experts, x: Float[Array, 'b t i']) -> Float[Array, 'b t o']:
            nonlocal taken
            y, found = self.run(x, choice, matrices_of(experts))
            taken = taken & found
            return y

        if {'conv', 'gate'} & set(self.replaced):
            u = through(self.conv_experts, x) if 'conv' in self.replaced else project(x, self.conv_proj)
            z = through(self.gate_experts, x) if 'gate' in self.replaced else project(x, self.gate_proj)
        else:
            u, z = self.halves(x)
        y, state = self.scanned(u, z, context, state)
        y = through(self.output_experts, y) if 'output' in self.replaced else project(y, self.out_proj)
        return y, state, self.report(choice, context, taken)
