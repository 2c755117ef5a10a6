"""A step that sums gradients over ``mesh.data`` once is one device's step, and is refused where it could not be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax.errors import ConfigError
from mixcon_jax.parallel import apart, layout
from mixcon_jax.parallel.axes import RULES
from mixcon_jax.parallel.rules import current, on_mesh
from tests.test_meshes import CONVOLUTIONS, INNER, MATRICES, RWKV, SORTED, assert_same, one_step, wanted
from tests.training import mesh_of, step_config

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
WITHOUT_ROOM = INNER | {'model__moe__expert_capacity': 0.0}
CASES = [
    slow({'data': 4}, {}),
    slow({'data': 2, 'fsdp': 2, 'tensor': 2}, {}),
    ({'data': 2, 'expert': 2}, {'model__pattern': ('attention|moe',)}),
    slow({'data': 2, 'context': 2, 'tensor': 2}, {}),
    slow({'data': 2, 'expert': 2, 'tensor': 2}, WITHOUT_ROOM),
    slow({'data': 2, 'context': 2}, CONVOLUTIONS),
    slow({'data': 2, 'context': 2, 'tensor': 2}, MATRICES),
    slow({'data': 4, 'tensor': 2}, RWKV),
    slow({'data': 4}, SORTED),
    slow({'data': 2, 'fsdp': 2, 'tensor': 2}, SORTED),
]


def ids(case):
    return 'x'.join(f'{k}{v}' for k, v in case.items()) or '-'


@pytest.mark.parametrize('mesh, options', CASES, ids=ids)
def test_a_step_is_that_of_one_device(mesh, options, monkeypatch):
    """Metrics and gradients: with the losses of experts, which are of all rows, and statistics that are no means."""
    options, seen, groups = options | {'train__accum_steps': 2}, [], apart.groups
    monkeypatch.setattr(apart, 'groups', lambda: seen.append(groups()) or groups())
    got = one_step(int(np.prod(list(mesh.values()))), mesh, options | {'train__sum_gradients': 'step'})
    assert set(seen) == {mesh['data']}
    assert_same(got, wanted(**options))


def mesh():
    return mesh_of(configs.validate(step_config(mesh__data=2, mesh__fsdp=2, train__batch_size=4), 4), 4)


def part(rows, weights):
    """A sum over rows, and of all groups a mean, of which each group's result holds its share."""
    mean = apart.total(jnp.sum(jnp.tanh(rows @ weights))) / apart.total(len(rows))
    return jnp.sum(rows @ weights) + mean**2 / apart.groups()


def test_sums_and_totals_are_those_of_all_rows():
    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    want = jax.value_and_grad(part, argnums=1)(rows, weights)

    def summed(rows, weights):
        return apart.summed(jax.value_and_grad(part, argnums=1), rows, weights)

    with on_mesh(mesh(), RULES):
        got = jax.jit(summed)(*jax.device_put((rows, weights), layout.replicated(mesh())))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


def test_a_group_shares_out_by_the_other_axes():
    seen = []

    def look(rows):
        seen.append((apart.groups(), dict(current())))
        return rows.sum()

    with on_mesh(mesh(), RULES):
        jax.jit(lambda rows: apart.summed(look, rows)).trace(jnp.ones((4, 2)))
        assert apart.groups() == 1 and current() == RULES
    (groups, table), *_ = seen
    assert groups == 2 and table['batch'] == ('fsdp', 'expert') and table['heads'] == RULES['heads']


@pytest.mark.parametrize(
    'options, words',
    [
        ({'model__pattern': ('conba',), 'model__conba__process_noise': 0.1}, 'model.conba.process_noise=0.1 takes all'),
        ({'model__pattern': ('conba',), 'model__conba__observation_noise': 0.1}, 'model.conba.observation_noise=0.1'),
        (
            {'model__pattern': ('mamba+moe',), 'model__moe__expert_capacity': 1.5},
            'model.moe.expert_capacity=1.5 takes all rows of a microbatch at once',
        ),
        ({'mesh__rules': ('embed=data',)}, 'mesh.rules splits embed'),
    ],
)
def test_what_takes_all_rows_at_once_is_refused(options, words):
    options = options | {'mesh__data': 2, 'train__batch_size': 8}
    once = {'train__accum_steps': 2, 'train__sum_gradients': 'step'}
    with pytest.raises(ConfigError, match=words):
        configs.validate(step_config(**options, **once), 2)
    configs.validate(step_config(**options), 2)
    configs.validate(step_config(**options | once | {'train__accum_steps': 1}), 2)
    configs.validate(step_config(**options | once | {'mesh__data': 1}), 1)
