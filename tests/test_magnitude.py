"""The norm of a tree and whether it is finite, however large its arrays are and however devices share them out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax import config as configs
from mixcon_jax.parallel import magnitude
from mixcon_jax.parallel.axes import RULES
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.parallel.rules import on_mesh

SHAPES = {
    'scalar': (), 'none': (0, 4), 'one': (1,), 'odd': (3, 7), 'rows': (8, 9001), 'narrow': (4, 8209, 3),
    'column': (65537, 1), 'vector': (8,), 'other': (10,), 'wide': (4, 70000),
    'small': (4, 6), 'stack': (2, 12, 8), 'large': (2, 400, 400),
}  # fmt: skip
SPECS = {name: PartitionSpec() for name in SHAPES} | {
    'vector': PartitionSpec('fsdp'),
    'other': PartitionSpec('fsdp'),
    'wide': PartitionSpec(None, ('fsdp',)),
    'small': PartitionSpec(('fsdp', 'data'), None),
    'stack': PartitionSpec(None, 'fsdp', 'tensor'),
    'large': PartitionSpec(None, 'tensor', 'fsdp'),
}
WAYS = 4  # of splitting: not at all, and three sets of axes
MESHES = [{}, {'fsdp': 2}, {'data': 2, 'fsdp': 2, 'tensor': 2}]
assert np.prod(SHAPES['large']) // 4 > magnitude.SMALL  # on each device


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


@functools.cache
def run(function, *mesh):
    """A function of `magnitude`, compiled for a mesh, and how it is given a tree."""
    config = configs.default().mesh
    config.update({'data': 1} | dict(mesh))
    made = make_mesh(config, jax.devices()[: int(np.prod([size for _, size in mesh]))])
    spec = lambda name: SPECS.get(name, PartitionSpec()) if mesh else PartitionSpec()

    @jax.jit
    def compiled(values):
        with on_mesh(made, RULES):
            return function(values, {name: spec(name) for name in values})

    return compiled, lambda values: {
        name: jax.device_put(x, NamedSharding(made, spec(name))) for name, x in values.items()
    }


@pytest.mark.parametrize('mesh', MESHES, ids=str)
@pytest.mark.parametrize('seed, dtype', [(0, np.float32), (1, np.float32), (2, jnp.bfloat16)])
def test_the_norm_against_float64(mesh, seed, dtype):
    compiled, put = run(magnitude.norm, *mesh.items())
    values = tree(seed, dtype)
    want = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in values.values()))
    np.testing.assert_allclose(compiled(put(values)), want, rtol=3e-7)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_one_number_that_is_not_finite_is_found_wherever_it_is(mesh, value):
    compiled, put = run(magnitude.all_finite, *mesh.items())
    values = tree(0) | {'step': np.int32(2**31 - 1), 'least': np.full((), -3e38, np.float32)}
    values['narrow'][:] = 3e38  # their sum is not finite
    values['odd'] = values['odd'].astype(jnp.bfloat16)
    assert compiled(put(values))
    for name in values.keys() - {'none', 'step'}:
        for place in {0, values[name].size - 1}:
            spoilt = {key: np.array(x) for key, x in values.items()}
            spoilt[name].reshape(-1)[place] = value
            assert not compiled(put(spoilt)), (name, place)


@pytest.mark.parametrize('function', [magnitude.norm, magnitude.all_finite])
def test_devices_exchange_a_number_for_each_way_of_splitting_not_for_each_array(function):
    compiled, put = run(function, *MESHES[-1].items())
    text = compiled.lower(put(tree(0))).compile().as_text()
    taken = [part.count('%') for part in re.findall(r' all-reduce\(([^)]*)\)', text)]
    assert sum(taken) == WAYS - 1, text
