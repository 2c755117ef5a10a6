"""The grouped product for Hopper in Mosaic's interpreter: right against float64, and blind to what is not a group's.

All runs as it is compiled: roles, loops, copies, barriers, products. Races with the copy engine are looked for, too;
what a product reads from shared memory is not among what the interpreter watches.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import mosaic_gpu, reference
from tests.kernels_pallas import interpreted

TOLERANCE = 4e-3
FEW = mosaic_gpu.Settings(blocks=2)  # so that a block has several tiles


def draw(rows, groups, width, columns):
    rng = np.random.default_rng(rows + groups + width)
    shapes = (rows, width), (groups, width, columns), (rows, columns)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def exact(x, w, dy, sizes):
    """The product and its gradients in float64."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x, np.float64))
        y, pull = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, jnp.asarray(sizes)), wide(x), wide(w))
        return [np.asarray(found) for found in (y, *pull(wide(dy)))]


def interpret(x, w, dy, sizes, settings=FEW):
    parameters, sizes = interpreted.parameters(), jnp.asarray(sizes, jnp.int32)
    y = mosaic_gpu.product(x, w, sizes, parameters, settings)
    dx = mosaic_gpu.product(dy, w, sizes, parameters, settings, turned=True)
    return y, dx, mosaic_gpu.matrices(x, dy, sizes, parameters, settings)


def close(actual, expected):
    assert actual.dtype == jnp.bfloat16 and actual.shape == expected.shape
    actual = np.asarray(actual, np.float64)
    assert np.linalg.norm(actual - expected) <= TOLERANCE * np.linalg.norm(expected)
    assert (actual[expected == 0] == 0).all()  # rows after the groups, and the matrices of empty ones


# rows of the groups, rows, width, columns
CASES = [
    ((30, 0, 101, 0), 150, 64, 192),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            ((0, 1, 139, 8), 148, 192, 64),
            ((64, 128, 256, 1, 1), 450, 128, 128),
            ((0, 0, 0), 5, 64, 64),
            ((129,), 129, 64, 256),
            ((7, 9, 8, 120, 17), 161, 128, 64),
            ((300, 0, 20), 333, 320, 192),
        )
    ),
]


SETTINGS = [FEW, pytest.param(mosaic_gpu.Settings(3, 192, 3), marks=pytest.mark.slow)]  # the other is for trials


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_products_and_gradients_equal_float64(case, settings):
    """Rows after the last group are nan, and count nowhere."""
    sizes, rows, width, columns = case
    x, w, dy = draw(rows, len(sizes), width, columns)
    expected = exact(x, w, dy, sizes)
    rest = (jnp.arange(rows) >= sum(sizes))[:, None]
    poisoned = lambda x: jnp.where(rest, jnp.nan, x).astype(x.dtype)
    for a, b in zip(interpret(poisoned(x), w, poisoned(dy), sizes, settings), expected):
        close(a, b)


def test_what_another_group_holds_counts_nowhere():
    """A group of nan, rows and matrix: the others share tiles of rows and steps with it."""
    sizes, names = (21, 70, 45), ('y', 'dx', 'dw')
    x, w, dy = draw(136, 3, 64, 64)
    expected = dict(zip(names, exact(x, w, dy, sizes)))
    owner = np.repeat(np.arange(3), sizes)
    bad = jnp.asarray(owner == 1)[:, None]
    x, dy = (jnp.where(bad, jnp.nan, x).astype(x.dtype) for x in (x, dy))
    found = dict(zip(names, interpret(x, w.at[1].set(jnp.nan), dy, sizes)))
    for name, which in (('y', owner), ('dx', owner), ('dw', np.arange(3))):
        assert np.isnan(np.asarray(found[name], np.float64)[which == 1]).all()
        close(found[name][which != 1], expected[name][which != 1])


def test_the_gradient_is_by_the_kernels(monkeypatch):
    """Under `jit`, with any integers for the sizes; the kernels' own results are the other tests'."""
    calls = []

    def product(x, w, group_sizes, interpret, settings, turned=False):
        calls.append((turned, settings))
        return reference.grouped_matmul(x, jnp.swapaxes(w, 1, 2) if turned else w, group_sizes)

    def matrices(x, dy, group_sizes, interpret, settings):
        calls.append(('matrices', settings))
        w = jnp.zeros((len(group_sizes), x.shape[1], dy.shape[1]), x.dtype)
        return jax.vjp(lambda w: reference.grouped_matmul(x, w, group_sizes), w)[1](dy)[0]

    monkeypatch.setattr(mosaic_gpu, 'product', product)
    monkeypatch.setattr(mosaic_gpu, 'matrices', matrices)
    arrays = [x.astype(jnp.float32) for x in draw(20, 3, 64, 128)]
    sizes = jnp.asarray([3, 9, 4], jnp.int16)

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: mosaic_gpu.grouped_matmul(x, w, sizes, None, FEW), x, w)
        return y, *pull(dy)

    for a, b in zip(run(*arrays), exact(*arrays, np.asarray(sizes, np.int32))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert sorted(map(str, calls)) == sorted(str((kind, FEW)) for kind in (False, True, 'matrices'))
