"""The matrix gain's GPU kernels in Mosaic's interpreter: outputs and gradients equal the sequential law in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.adaptive_gain import mosaic_gpu, reference
from tests.kernels_pallas import interpreted

# batch, tokens, heads, channels, reset: lengths off the tiles (16, 8) and on them, heads that fill no block, one token
CASES = [
    (1, 21, 4, 32, True),
    (1, 1, 5, 32, False),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in ((2, 7, 3, 16, True), (1, 16, 4, 16, False), (1, 33, 2, 32, True))  # of 16 channels: below
    ),
]


def draw(batch, length, heads, width, reset):
    rng = np.random.default_rng(length + width)
    arrays = (
        2 * rng.normal(size=(batch, length, heads, width)),
        rng.uniform(size=(batch, length, heads)),
        -rng.exponential(0.1, size=(batch, length, heads)),
        rng.normal(size=(batch, heads, width, width)),
    )
    flags = rng.random((batch, length)) < 0.15
    flags[0, [0, length - 1]] = True
    flags[0, 8:10] = True  # the border of a tile, and a document of one token
    cotangents = rng.normal(size=arrays[0].shape), rng.normal(size=arrays[3].shape)
    return arrays, jnp.asarray(flags) if reset else None, cotangents


def oracle(arrays, reset, cotangents):
    def law(e, alpha, log_decay, gain):
        phi = e / jnp.sqrt(jnp.sum(e * e, -1, keepdims=True) + reference.EPS)
        flags = jnp.zeros(e.shape[:2], bool) if reset is None else reset
        return reference.matrix(e, phi, alpha, log_decay, flags, gain)

    with jax.enable_x64(True):
        outputs, vjp = jax.vjp(law, *(jnp.asarray(x, jnp.float64) for x in arrays))
        gradients = vjp(tuple(jnp.asarray(x, jnp.float64) for x in cotangents))
    return [np.asarray(x) for x in (*outputs, *gradients)]


def interpret(arrays, reset, cotangents):
    def run(e, alpha, log_decay, gain):
        return mosaic_gpu.matrix(e, alpha, log_decay, reset, gain, interpret=interpreted.parameters())

    outputs, vjp = jax.vjp(run, *(jnp.asarray(x, jnp.float32) for x in arrays))
    return *outputs, *vjp(tuple(jnp.asarray(x, jnp.float32) for x in cotangents))


NAMES = ('read', 'final gain', 'de', 'dalpha', 'dlog_decay', 'dinitial_gain')


@pytest.mark.parametrize('case', CASES, ids=str)
def test_outputs_and_gradients_equal_the_law(case):
    arguments = draw(*case)
    for name, actual, expected in zip(NAMES, interpret(*arguments), oracle(*arguments), strict=True):
        error = np.linalg.norm(np.asarray(actual, np.float64) - expected)
        assert error <= 2e-6 * np.linalg.norm(expected), (name, error)


def test_forgetting_everything_keeps_every_gradient_finite_and_right():
    arrays, reset, cotangents = draw(1, 12, 4, 16, True)
    arrays[2][:, ::3] = -500.0
    arrays[0][:, 4:6] = 0.0
    arguments = arrays, reset, cotangents
    for name, actual, expected in zip(NAMES, interpret(*arguments), oracle(*arguments), strict=True):
        assert np.isfinite(actual).all(), name
        if name != 'de':  # where e = 0, e's gradient has the size of alpha / 1e-6
            assert np.linalg.norm(np.asarray(actual, np.float64) - expected) <= 1e-5 * np.linalg.norm(expected), name


@pytest.mark.slow  # the cases of the cards, which tests/gpu/test_accept.py runs, ask it, too
def test_the_same_call_twice_gives_identical_bits():
    arguments = draw(1, 9, 4, 16, True)
    for first, second in zip(interpret(*arguments), interpret(*arguments), strict=True):
        np.testing.assert_array_equal(first, second)
