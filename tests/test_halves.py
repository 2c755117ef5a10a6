"""A matrix of two halves on devices that need their part of both."""

import jax
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax.parallel import layout
from mixcon_jax.parallel.axes import RULES
from mixcon_jax.parallel.halves import halves
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.parallel.rules import on_mesh
from mixcon_jax.planning.collectives import collectives


@pytest.mark.parametrize('tensor', [2, 3, 4, 6, 8])
def test_each_device_gets_its_part_of_both(tensor):
    """Values, gradients, where they lie; and no device gets more than its part of the matrix, there and back."""
    config = configs.default().mesh
    config.update(data=1, tensor=tensor)
    mesh = make_mesh(config, jax.devices()[:tensor])
    weight, dy = np.random.default_rng(tensor).normal(size=(2, 5, 2 * 24)).astype(np.float32)
    with on_mesh(mesh, RULES):
        columns = jax.NamedSharding(mesh, layout.partition_spec((None, 'inner'), weight.shape, mesh))
        apart = jax.NamedSharding(mesh, layout.partition_spec((None, None, 'inner'), (5, 2, 24), mesh))

    def run(weight, dy):
        with on_mesh(mesh, RULES):
            y, pull = jax.vjp(lambda weight: halves(weight, 'inner'), weight)
            return y, pull(dy)[0]

    dy = dy.reshape(5, 2, 24)
    compiled = jax.jit(run, in_shardings=(columns, apart), out_shardings=(apart, columns)).lower(weight, dy).compile()
    y, gradient = compiled(jax.device_put(weight, columns), jax.device_put(dy, apart))
    np.testing.assert_array_equal(y, weight.reshape(5, 2, 24))
    np.testing.assert_array_equal(gradient, dy.reshape(5, 48))
    if tensor % 2 == 0:
        found = {kind: number for kind, (number, _) in collectives(compiled.as_text()).items() if number}
        assert found.keys() == {'collective-permute'}
