"""Flags of XLA's: what the option says reaches the compiler, what it does not know is refused by name, and all that the
project lists compile."""

import types

import jax
import jax.numpy as jnp
import pytest

from mixcon_jax import config as configs
from mixcon_jax import step
from mixcon_jax.errors import ConfigError
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.planner.programs import BATCH
from mixcon_jax.planning import compiling
from mixcon_jax.planning.collectives import collectives
from mixcon_jax.step import make_steps
from mixcon_jax.xla_flags import DETERMINISTIC, FLAGS, compiler_options, parse
from tests.training import step_config

CPU = jax.devices()[0]


def test_values_have_their_types():
    texts = ('xla_a=true', 'xla_b=False', 'xla_c=4', 'xla_d=0.5', 'xla_e=FUSION,CUBLAS', 'xla_f=', 'xla_g=a=b')
    expected = {'xla_a': True, 'xla_b': False, 'xla_c': 4, 'xla_d': 0.5, 'xla_e': 'FUSION,CUBLAS', 'xla_f': ''}
    found = parse(texts)
    assert found == expected | {'xla_g': 'a=b'}
    assert [type(value) for value in found.values()] == [bool, bool, int, float, str, str, str]


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ConfigError, match=f'{DETERMINISTIC}.*train.deterministic'):
        parse((f'{DETERMINISTIC}=true',))
    with pytest.raises(ConfigError, match='xla_a twice'):
        parse(('xla_a=1', 'xla_a=2'))
    with pytest.raises(ConfigError, match=r'train.xla_flags.*xla_gpu_no_such_flag'):
        compiler_options(True, ('xla_gpu_no_such_flag=1',), CPU)
    with pytest.raises(ConfigError, match=r'train.xla_flags.*xla_gpu_autotune_level'):
        compiler_options(True, ('xla_gpu_autotune_level=high',), CPU)
    config = configs.default()
    for wrong in ('--xla_gpu_autotune_level=0', 'xla_gpu_autotune_level', 'autotune_level=0'):
        config.train.xla_flags = (wrong,)
        with pytest.raises(ConfigError, match=r'train.xla_flags.*NAME=VALUE'):
            configs.validate(config)


def test_sums_are_ordered_on_gpus_that_are_here(monkeypatch):
    """XLA's option is for a GPU alone, and not for one that is compiled for while absent."""
    here, absent = (types.SimpleNamespace(platform='gpu', id=number) for number in range(2))
    monkeypatch.setattr(jax, 'devices', lambda: [here])
    assert compiler_options(True, (), here) == {DETERMINISTIC: True}
    assert compiler_options(False, (), here) is None
    assert compiler_options(True, (), absent) is None
    assert compiler_options(True, (), types.SimpleNamespace(platform='cpu')) is None


@pytest.mark.parametrize('name', FLAGS)
def test_every_flag_is_one_of_the_pinned_xla(name):
    device = CPU if name == DETERMINISTIC else compiling.devices('h100')[0]
    x = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    jax.jit(jnp.matmul, compiler_options={name: FLAGS[name].value}).trace(x, x).lower(
        lowering_platforms=('cpu' if name == DETERMINISTIC else 'cuda',)
    ).compile()


def traced(config, devices):
    """The train step of a configuration on these devices."""
    steps = make_steps(config, make_mesh(config.mesh, devices))
    shape = (config.train.batch_size, config.data.seq_len)
    batch = {key: jax.ShapeDtypeStruct(shape, kind) for key, kind in BATCH.items()}
    return steps.train_step.trace(steps.abstract_state, batch)


def exchanges_of_a_step(flags):
    """Exchanges in a step compiled for eight absent H100s with these flags."""
    texts = tuple(f'{name}={value}' for name, value in flags.items())
    options = {'model.pattern': ('attention+mlp',), 'mesh.data': 2, 'mesh.fsdp': 4, 'train.xla_flags': texts}
    config = step_config(**options)
    devices = compiling.devices('h100', 1, 8)
    with jax.default_device(devices[0]):
        compiled = traced(config, devices).lower(lowering_platforms=('cuda',)).compile()
    return sum(number for number, _ in collectives(compiled.as_text()).values())


def test_what_the_options_say_is_what_the_step_is_compiled_with(monkeypatch):
    """XLA refuses what it does not know, and so it was told."""
    monkeypatch.setattr(step, 'compiler_options', lambda *_: {'xla_no_such_flag': True})
    lowered = traced(step_config(**{'model.pattern': ('attention',)}), [CPU]).lower()
    with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such_flag'):
        lowered.compile()


@pytest.mark.slow  # that each compiles, and that options reach the step, is shown above
def test_a_step_compiles_with_all_of_them_and_the_option_reaches_it():
    flags = {name: flag.value for name, flag in FLAGS.items() if name != DETERMINISTIC}
    apart = flags | {name: 1 for name in flags if name.endswith('_combine_threshold_bytes')}
    assert 0 < exchanges_of_a_step(flags) < exchanges_of_a_step(apart)
