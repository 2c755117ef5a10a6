"""The diagonal gain's GPU kernels in Mosaic's interpreter: outputs and gradients equal the law in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.adaptive_gain import diagonal_mosaic_gpu, reference
from kernels_pallas.adaptive_gain.diagonal_mosaic_gpu import BLOCKS, MOST, SHORTEST, TILE, default_segments
from tests.kernels_pallas import interpreted

# seed, batch, tokens, heads, channels, reset, segments: lengths off the tiles (16) and on them, heads that fill no
# block (8 of 16 channels, else 4) or several, one token, one head, the last segment shorter
CASES = [
    (1, 2, 19, 8, 16, True, 1),
    (2, 1, 1, 1, 64, False, 1),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            (0, 2, 21, 5, 32, True, 2),
            (0, 2, 37, 5, 32, True, 2),
            (3, 2, 70, 4, 32, True, 3),
            (4, 1, 32, 3, 64, True, 2),
            (5, 3, 16, 9, 16, False, 1),
            (6, 1, 129, 1, 32, True, 4),
        )
    ),
]
NAMES = ('read', 'final gain', 'de', 'dalpha', 'dlog_decay', 'dinitial_gain')


def draw(seed, batch, length, heads, width, reset):
    rng = np.random.default_rng(seed)
    arrays = (
        2 * rng.normal(size=(batch, length, heads, width)),
        rng.uniform(size=(batch, length, heads)),
        -rng.exponential(0.1, size=(batch, length, heads)),
        rng.normal(size=(batch, heads, width)),
    )
    arrays[0][:, 2::7, :, 0] = 0.0  # a channel that learns nothing
    arrays[1][:, 3::5], arrays[2][:, 3::5] = 0.0, 0.0  # padding
    flags = rng.random((batch, length)) < 0.1
    flags[0, [0, length - 1]] = True
    flags[-1, 15:17] = True  # the border of a tile, and a document of one token
    cotangents = rng.normal(size=arrays[0].shape), rng.normal(size=arrays[3].shape)
    return arrays, jnp.asarray(flags) if reset else None, cotangents


def oracle(arrays, reset, cotangents):
    def law(e, alpha, log_decay, gain):
        flags = jnp.zeros(e.shape[:2], bool) if reset is None else reset
        return reference.diagonal(e, alpha, log_decay, flags, gain)

    with jax.enable_x64(True):
        outputs, vjp = jax.vjp(law, *(jnp.asarray(x, jnp.float64) for x in arrays))
        gradients = vjp(tuple(jnp.asarray(x, jnp.float64) for x in cotangents))
    return [np.asarray(x) for x in (*outputs, *gradients)]


def interpret(arrays, reset, cotangents, segments):
    def run(e, alpha, log_decay, gain):
        options = {'segments': segments, 'interpret': interpreted.parameters()}
        return diagonal_mosaic_gpu.diagonal(e, alpha, log_decay, reset, gain, **options)

    outputs, vjp = jax.vjp(run, *(jnp.asarray(x, jnp.float32) for x in arrays))
    return *outputs, *vjp(tuple(jnp.asarray(x, jnp.float32) for x in cotangents))


def agree(actual, expected, but=()):
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        assert np.isfinite(one).all(), name
        error = np.linalg.norm(np.asarray(one, np.float64) - other)
        assert name in but or error <= 1e-6 * np.linalg.norm(other), (name, error)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_outputs_and_gradients_equal_the_law(case):
    *sizes, segments = case
    arguments = draw(*sizes)
    agree(interpret(*arguments, segments), oracle(*arguments))


@pytest.mark.slow  # the next test compares two programs bit for bit
def test_twice_they_are_the_same_bits():
    arguments = draw(0, 2, 21, 5, 32, True)
    for one, other in zip(interpret(*arguments, 2), interpret(*arguments, 2), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('segments', [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.slow  # the outputs are compared with the law above
def test_without_a_gradient_the_outputs_are_the_same_bits(segments):
    (e, alpha, log_decay, gain), reset, _ = arguments = draw(7, 1, 17, 4, 32, True)
    options = {'segments': segments, 'interpret': interpreted.parameters()}
    arrays = (jnp.asarray(x, jnp.float32) for x in (e, alpha, log_decay))
    alone = diagonal_mosaic_gpu.diagonal(*arrays, reset, jnp.asarray(gain, jnp.float32), **options)
    for one, other in zip(alone, interpret(*arguments, segments)[:2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_forgetting_everything_and_no_error_keep_every_gradient_finite_and_right():
    arrays, reset, cotangents = draw(8, 1, 20, 4, 32, True)
    arrays[2][:, ::3] = -500.0
    arrays[0][:, 4:6] = 0.0
    arguments = arrays, reset, cotangents
    agree(interpret(*arguments, 1), oracle(*arguments))


def test_errors_of_one_size_learn_in_full_and_pass_their_gradient_on():
    """In float32 the share rounds to 1, where min has no derivative; in float64 it is just below."""
    arrays, reset, cotangents = draw(9, 1, 18, 4, 32, False)
    arrays[0][:] = np.sign(arrays[0]) + (arrays[0] == 0)
    arguments = arrays, reset, cotangents
    actual, expected = interpret(*arguments, 1), oracle(*arguments)
    agree(actual, expected)


@pytest.mark.slow  # segments and resets are in the cases above
def test_a_row_may_be_split_anywhere_and_documents_are_kept_apart():
    arrays, _, cotangents = draw(10, 1, 40, 4, 32, False)
    reset = jnp.zeros((1, 40), bool).at[0, 23].set(True)
    read = lambda arrays, segments: interpret(arrays, reset, cotangents, segments)[0]
    whole = read(arrays, 1)
    other = [x.copy() for x in arrays]
    other[0][:, :23] += 1.0
    other[3][:] += 1.0
    changed = read(other, 1)
    np.testing.assert_array_equal(whole[:, 23:], changed[:, 23:])
    assert (np.abs(whole - changed)[:, 1:23] > 0).any(-1).all()
    np.testing.assert_allclose(whole, read(arrays, 3), rtol=1e-5, atol=1e-6)


def test_time_is_cut_only_where_rows_and_heads_leave_the_gpu_idle():
    assert default_segments(BLOCKS // 2 + 1, 1 << 20) == 1
    assert default_segments(BLOCKS // 2, 1 << 20) == 2
    assert default_segments(1, 1 << 20) == MOST
    assert [default_segments(1, length) for length in (1, TILE * SHORTEST, 2 * TILE * SHORTEST)] == [1, 1, 2]


@pytest.mark.parametrize(
    'capability, dtype, width, words',
    [
        ((8, 0), jnp.float32, 32, 'it needs compute capability 9.0 or newer, and this GPU has 8.0'),
        ((9, 0), jnp.float64, 32, 'it computes in float32, and an input is float64'),
        ((9, 0), jnp.float32, 24, 'it holds heads of 16, 32 or 64 channels, not 24'),
        ((9, 0), jnp.float32, 64, None),
    ],
)
def test_refusals(monkeypatch, capability, dtype, width, words):
    monkeypatch.setattr(diagonal_mosaic_gpu.platform, 'compute_capability', lambda: capability)
    assert diagonal_mosaic_gpu.unsupported(dtype, width) == words
