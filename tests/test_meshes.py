"""A step of a MixCon of every layer type on meshes of eight devices gives one device's loss and gradients."""

import functools

import jax
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax import step
from mixcon_jax.trees import named_leaves
from tests.training import mesh_of, random_batch, step_config

LENGTH, VOCAB = 16, 64
OPTIONS = {
    'model__pattern': ('conba+moe', 'mamba+mlp', 'attention|moe'),
    'model__num_blocks': 1,
    'model__vocab_size': VOCAB,
    'model__attention__num_heads': 4,
    'model__attention__num_kv_heads': 4,
    'model__conba__head_dim': 8,
    'model__conba__gain_chunk': 4,
    'model__ssm__d_state': 4,
    'model__ssm__chunk': 2,
    'model__moe__num_experts': 8,
    'model__moe__implementation': 'grouped',
    'model__moe__group_block': 4,
    'model__moe__router_z_coef': 0.01,
    'data__seq_len': LENGTH,
    'train__z_loss_coef': 0.001,
    'optim__clip_norm': 0.0,
}
SIXTEEN = {'model__moe__num_experts': 16}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MESHES = [
    slow({'data': 8}, {}),
    slow({'fsdp': 8}, {}),
    slow({'fsdp': 2, 'tensor': 4}, {}),
    slow({'fsdp': 2, 'expert': 4}, {}),
    slow({'context': 4, 'fsdp': 2}, {}),
    ({'data': 2, 'expert': 2, 'tensor': 2}, {}),
    slow({'context': 2, 'expert': 2, 'tensor': 2}, {}),
    slow({'expert': 8}, {}),
    slow({'expert': 8}, SIXTEEN),
]


def one_step(devices, mesh, options):
    """Metrics and gradients of the first step: Adam's first moment is a tenth of them."""
    axes = {f'mesh__{axis}': size for axis, size in mesh.items()}
    config = configs.validate(step_config(**OPTIONS | options | {'mesh__data': 1} | axes), devices)
    steps = step.make_steps(config, mesh_of(config, devices))
    batch = steps.put(random_batch(1, 8, LENGTH, VOCAB))
    state, metrics = steps.train_step(steps.init_state(), batch)
    moment = next(part.mu for part in state.opt_state if hasattr(part, 'mu'))
    return jax.device_get((metrics, jax.tree.map(lambda m: m / 0.1, moment)))


@functools.cache
def wanted(**options):
    return one_step(1, {}, options)


@pytest.mark.parametrize('mesh, options', MESHES, ids=lambda case: 'x'.join(f'{k}{v}' for k, v in case.items()) or '-')
def test_a_step_on_a_mesh_is_that_of_one_device(mesh, options):
    want, got = named_leaves(wanted(**options)), named_leaves(one_step(8, mesh, options))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-6, err_msg=name)
