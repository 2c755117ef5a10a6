"""The mesh, and where arrays lie on it."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mixcon_jax import config as configs
from mixcon_jax import step
from mixcon_jax.config import ConfigError
from mixcon_jax.parallel import layout
from mixcon_jax.parallel.axes import AXES
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.trees import named_leaves
from tests.training import mesh_of, step_config


def mesh_config(**axes):
    config = configs.default().mesh
    config.update(axes)
    return config


@pytest.mark.parametrize(
    'axes, shape',
    [
        ({}, (8, 1, 1, 1, 1)),
        ({'fsdp': 4}, (2, 4, 1, 1, 1)),
        ({'data': 2, 'fsdp': 2, 'tensor': 2}, (2, 2, 1, 1, 2)),
        ({'expert': 8}, (1, 1, 8, 1, 1)),
        ({'data': 2, 'context': 2, 'expert': -1}, (2, 1, 2, 2, 1)),
        ({'data': 1, 'fsdp': -1, 'tensor': 2}, (1, 4, 1, 1, 2)),
    ],
)
def test_one_axis_takes_what_the_others_leave(axes, shape):
    mesh = make_mesh(mesh_config(**axes))
    assert tuple(mesh.shape.values()) == shape and tuple(mesh.shape) == AXES
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize('axes', [{'fsdp': 3}, {'data': 3}, {'data': 16}, {'data': 4, 'tensor': 4}, {'tensor': 16}])
def test_a_mesh_that_does_not_match_the_devices_is_refused(axes):
    with pytest.raises(ConfigError, match=r'mesh\.data .*mesh\.tensor .* number of devices, 8'):
        make_mesh(mesh_config(**axes))


def test_several_open_axes_are_refused():
    with pytest.raises(ConfigError, match=r'^mesh\.data and mesh\.tensor are -1; one axis alone'):
        make_mesh(mesh_config(tensor=-1))


def test_neighbouring_devices_differ_along_the_axes_that_exchange_most():
    ids = np.vectorize(lambda device: device.id)(make_mesh(mesh_config(data=2, context=2, tensor=2)).devices)
    np.testing.assert_array_equal(ids.ravel(), np.arange(8))
    assert AXES[-3:] == ('expert', 'context', 'tensor')


def test_specs_follow_the_table():
    mesh = make_mesh(mesh_config(data=1, fsdp=2, expert=2, tensor=2))
    spec = lambda axes, shape: layout.partition_spec(axes, shape, mesh)
    axis = lambda name: (name,)
    assert spec(('layers', 'embed', 'inner'), (3, 4, 6)) == P(None, axis('fsdp'), axis('tensor'))
    assert spec(('layers', 'experts', 'mlp', 'embed'), (3, 4, 6, 8)) == P(
        None, axis('expert'), axis('tensor'), axis('fsdp')
    )
    assert spec(('vocab', 'embed'), (7, 4)) == P(None, axis('fsdp'))  # 7 does not split in 2: whole
    assert spec(('inner', 'inner'), (4, 4)) == P(axis('tensor'), None)  # an axis splits one dimension only
    assert spec(('batch', None, 'embed'), (4, 5, 4)) == P(('fsdp', 'expert'), None, None)
    assert spec(('norm',), (4,)) == P(None)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'lion', 'adafactor'])
def test_optimizer_state_lies_like_its_parameters(optimizer):
    config = step_config(mesh__fsdp=8, optim__name=optimizer)
    steps = step.make_steps(config, mesh_of(config, 8))
    params = named_leaves(steps.abstract_state.params)
    matched = set()
    for path, leaf in named_leaves(steps.abstract_state.opt_state).items():
        owner = next((name for name in params if f'/{name}/' in f'/{path}/'), None)
        if owner is not None and leaf.shape == params[owner].shape:
            assert leaf.sharding == params[owner].sharding, path
            matched.add(owner)
        else:
            assert leaf.sharding.is_fully_replicated and math.prod(leaf.shape) <= 64, path
    assert matched == set(params)  # at this size Adafactor factors nothing


def test_fsdp_leaves_each_device_its_share():
    config = step_config(mesh__fsdp=8)
    steps = step.make_steps(config, mesh_of(config, 8))
    state = steps.init_state()
    for name, leaf in named_leaves(state.params).items():
        local = leaf.addressable_shards[0].data.size
        assert local * (8 if 'embed' in steps.logical_axes[name] else 1) == leaf.size, name


def test_put_makes_one_global_batch():
    config = step_config(mesh__fsdp=2)
    steps = step.make_steps(config, mesh_of(config, 4))
    batch = {key: np.arange(8 * 5).reshape(8, 5).astype(np.int32) for key in step.BATCH_KEYS} | {'more': np.ones(3)}
    placed = steps.put(batch)
    assert set(placed) == set(step.BATCH_KEYS)
    np.testing.assert_array_equal(placed['tokens'], batch['tokens'])
    assert placed['tokens'].addressable_shards[0].data.shape == (2, 5)
    with pytest.raises(ConfigError, match=r'6 rows .* 4 devices'):
        steps.put({key: value[:6] for key, value in batch.items()})


@pytest.mark.parametrize('batch_size, accum', [(6, 1), (8, 4), (12, 2)])
def test_a_batch_that_does_not_split_is_refused(batch_size, accum):
    config = step_config(train__batch_size=batch_size, train__accum_steps=accum)
    with pytest.raises(
        ConfigError, match=r'^mesh\.data x mesh\.fsdp x mesh\.expert=4 must divide train\.batch_size / train\.accum_'
    ):
        configs.check_mesh(config, 4)


@pytest.mark.slow  # their values are compared in tests/test_expert_parallel.py
def test_experts_multiply_only_their_devices_rows():
    """Without a split by rows every device would sort and multiply all rows; the compiled buffers tell."""
    config = configs.default()
    config.model.update(dim=32, pattern=('attention+moe',))
    config.train.batch_size, config.data.seq_len = 16, 128
    pairs = 16 * 128 * config.model.moe.top_k
    for data, fsdp in ((1, 1), (2, 2)):
        config.mesh.update(data=data, fsdp=fsdp)
        steps = step.make_steps(config, make_mesh(config.mesh, jax.devices()[: data * fsdp]))
        batch = {key: jax.ShapeDtypeStruct((16, 128), dtype) for key, dtype in step.BATCH.items()}
        program = steps.train_step.lower(steps.abstract_state, batch).compile().as_text()
        width = config.model.mlp.hidden_dim or 96 // config.model.moe.top_k
        assert f'f32[{pairs // (data * fsdp)},{width}]' in program
        if data * fsdp > 1:
            assert f'f32[{pairs},' not in program
