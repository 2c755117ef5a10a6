"""Experts on four absent H100s: what their devices exchange, compiled."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax import config as configs
from mixcon_jax.models.context import Context
from mixcon_jax.models.ffns.moe import MoE
from mixcon_jax.models.layers import Parameters
from mixcon_jax.parallel import layout
from mixcon_jax.parallel.axes import RULES
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.parallel.rules import on_mesh
from mixcon_jax.planning import compiling
from mixcon_jax.planning.collectives import collectives

ROWS, LENGTH, DIM, CHOICES, DEVICES = 8, 512, 128, 2, 4
# Features of every choice of a device's tokens: there and back, in the forward and in the backward pass.
NECESSARY = ROWS * LENGTH // DEVICES * CHOICES * DIM * 2 * 4


def compiled(experts, **options):
    """The gradient of a layer of experts, in bfloat16."""
    config = configs.default()
    config.model.update(dim=DIM, dtype='bfloat16')
    config.model.moe.update(num_experts=experts, top_k=CHOICES, hidden_dim=192, **options)
    config.mesh.update(data=1, expert=DEVICES)
    model = configs.validate(config).model
    mesh = make_mesh(config.mesh, compiling.devices('h100', devices_per_host=DEVICES))
    layer = nnx.eval_shape(lambda: MoE(model, Parameters(None), 4))
    graphdef, params = nnx.split(layer, nnx.Param)

    def place(variable):
        spec = layout.partition_spec(variable.logical_axes, variable.shape, mesh, RULES)
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, jnp.float32, sharding=NamedSharding(mesh, spec)))

    params = jax.tree.map(place, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    tokens = NamedSharding(mesh, PartitionSpec(('data', 'fsdp', 'expert')))
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, DIM), jnp.bfloat16, sharding=tokens)

    def loss(params, x):
        with on_mesh(mesh, RULES):
            y, _, aux = nnx.merge(graphdef, params)(x, Context.whole(ROWS, LENGTH), None)
        return jnp.sum(y.astype(jnp.float32) ** 2) + aux['losses']['balance'].value

    with jax.default_device(mesh.devices.flat[0]):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(params, x).lower(lowering_platforms=('cuda',))
        return lowered.compile().as_text()


@pytest.mark.parametrize('experts', [16, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.slow  # sizes alone; values as above
def test_padded_parts_are_little_more_than_what_must_travel(experts):
    found = collectives(compiled(experts, capacity=1.25))
    number, size = found['all-to-all']
    assert number == 5 and NECESSARY < size <= 1.3 * NECESSARY  # the numbers of experts travel, too


@pytest.mark.slow
def test_ragged_parts_compile():
    """Each of the four ways, and the numbers of experts; nothing else moves features."""
    found = collectives(compiled(16, exchange='ragged'))
    assert found['ragged-all-to-all'][0] == 5 and found['all-to-all'] == (0, 0)
    assert found['all-gather'][1] < NECESSARY / 100
