"""Causal convolutions equal a float64 loop, documents, states and gradients included."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.causal_conv1d import causal_conv1d, mosaic_gpu, past_reach, xla
from tests.kernels_pallas import interpreted

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

BATCH, CHANNELS = 2, 5
SHAPES = {
    'width 2': {'lags': (1, 0)},
    'width 4 + SiLU': {'lags': (3, 2, 1, 0), 'activation': 'silu'},
    'width 8 + SiLU': {'lags': tuple(range(7, -1, -1)), 'activation': 'silu'},
    'taps': {'lags': (1, 2, 4, 8), 'residual': True},
    'taps + SiLU': {'lags': (8, 1), 'residual': True, 'activation': 'silu'},
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, length, lags, bias=True):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    arrays = {
        'x': normal(BATCH, length, CHANNELS),
        'weight': normal(len(lags), CHANNELS),
        'bias': normal(CHANNELS),
        'initial_state': normal(BATCH, max(lags), CHANNELS),
    }
    reset = rng.random((BATCH, length)) < 0.2
    reset[0, [0, length - 1]] = True
    return arrays if bias else arrays | {'bias': None}, reset


def by_hand(arrays, reset, lags, activation=None, residual=False):
    """One channel of one token at a time: walk back from a token, and stop at the start of its document."""
    x, weight, bias, past = (np.asarray(arrays[n]) for n in ('x', 'weight', 'bias', 'initial_state'))
    row = np.concatenate([past, x], 1)
    longest, y = past.shape[1], np.zeros(x.shape)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = bias.copy()
            for lag, w in zip(lags, weight):
                if not reset[b, max(t - lag + 1, 0) : t + 1].any():
                    total += w * row[b, longest + t - lag]
            y[b, t] = total / (1 + np.exp(-total)) if activation else total
    return x + y if residual else y


def run(arrays, reset=None, **options):
    arrayed = {name: options.pop(name) for name in ('positions', 'mask') if name in options}
    return jax.jit(lambda arrays: causal_conv1d(**arrays, **options))(arrays | arrayed | {'reset': reset})


def outputs_and_gradients(arrays, reset, **options):
    def loss(arrays):
        outputs = run(arrays, reset, **options)
        weights = [jax.random.normal(jax.random.key(i), y.shape) for i, y in enumerate(outputs)]
        return sum(jnp.vdot(weight, jnp.sin(y)) for weight, y in zip(weights, outputs)), outputs

    return jax.value_and_grad(loss, has_aux=True)(arrays)


def assert_close(actual, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or {'rtol': 1e-12, 'atol': 1e-12})), actual, expected
    )


@pytest.mark.parametrize('length', [1, slow(2), slow(7), 33])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_equals_the_loop(implementation, shape, length):
    arrays, reset = draw(length, length, SHAPES[shape]['lags'])
    y, _ = run(arrays, reset, **SHAPES[shape], implementation=implementation)
    assert_close(y, by_hand(arrays, reset, **SHAPES[shape]))


@pytest.mark.parametrize('length', [1, slow(7), 33])
@pytest.mark.parametrize('shape', SHAPES)
def test_gradients_equal_those_of_the_sequential_form(shape, length):
    """Of x, weight, bias and the initial state, through outputs and the final state."""
    arrays, reset = draw(length + 1, length, SHAPES[shape]['lags'])
    reset = None if shape == 'taps' else reset
    expected = outputs_and_gradients(arrays, reset, **SHAPES[shape], implementation='reference')
    assert_close(outputs_and_gradients(arrays, reset, **SHAPES[shape]), expected)


def test_without_bias_and_state_both_are_zero():
    arrays, reset = draw(3, 9, (3, 2, 1, 0), bias=False)
    bare = {name: arrays[name] for name in ('x', 'weight')}
    full = bare | {'bias': jnp.zeros(CHANNELS), 'initial_state': jnp.zeros((BATCH, 3, CHANNELS))}
    (_, outputs), gradients = outputs_and_gradients(bare, reset, activation='silu')
    expected = outputs_and_gradients(full, reset, activation='silu')
    assert_close(outputs, expected[0][1])
    assert_close(gradients, {name: expected[1][name] for name in bare})


@pytest.mark.parametrize('given', ['reset', 'positions'])
@pytest.mark.parametrize('shape', ['width 4 + SiLU', 'taps'])
@pytest.mark.parametrize('cut', [1, slow(2), 7, slow(19)])
def test_a_call_in_two_equals_one_call(shape, cut, given):
    """A state never hands on a token of an earlier document, whichever way documents are told."""
    arrays, reset = draw(cut, 20, SHAPES[shape]['lags'])
    reset[:, :3] = reset[1, 4:] = False
    reset[:, 0] = True
    told = {'reset': reset, 'positions': past_reach(jnp.asarray(reset))}[given]

    def part(piece, state):
        whole = arrays | {'x': arrays['x'][:, piece], 'initial_state': state}
        return run(whole, **{given: told[:, piece]}, **SHAPES[shape])

    first, state = part(slice(cut), arrays['initial_state'])
    second, state = part(slice(cut, None), state)
    assert_close((jnp.concatenate([first, second], 1), state), part(slice(None), arrays['initial_state']))


@pytest.mark.parametrize('length', [1, 2, 9])
def test_the_state_skips_padding_after_the_last_token(length):
    arrays, _ = draw(length, length, (3, 2, 1, 0))
    real = np.array([length - 1, 0])
    mask = np.arange(length) < real[:, None]
    _, state = run(arrays, mask=mask)
    for b, n in enumerate(real):
        row = np.concatenate([arrays['initial_state'][b], arrays['x'][b, :n]])
        assert_close(state[b], row[len(row) - 3 :])


def test_positions_beyond_the_call_reach_into_the_state():
    arrays, _ = draw(0, 4, (3, 2, 1, 0))
    positions = jnp.array([[2, 3, 4, 5], [7, 0, 1, 2]])
    y, state = causal_conv1d(**arrays, positions=positions)
    known = arrays | {'initial_state': arrays['initial_state'].at[0, 0].set(0.0)}  # before row 0's document
    assert_close(y, by_hand(known, np.array([[0, 0, 0, 0], [0, 1, 0, 0]], bool), (3, 2, 1, 0)))
    assert_close(state, arrays['x'][:, 1:])


@pytest.mark.parametrize('shape', SHAPES)
def test_narrow_types_are_summed_in_float32(shape):
    arrays, reset = draw(1, 257, SHAPES[shape]['lags'])
    narrow = arrays | {name: arrays[name].astype(jnp.bfloat16) for name in ('x', 'initial_state')}
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), narrow)
    narrow = narrow | {name: arrays[name].astype(jnp.float32) for name in ('weight', 'bias')}

    def graded(arrays, **options):
        def loss(arrays):
            y, _ = run(arrays, reset, **SHAPES[shape], **options)
            return jnp.vdot(jax.random.normal(jax.random.key(0), y.shape, jnp.bfloat16).astype(y.dtype), y), y

        return jax.grad(loss, has_aux=True)(arrays)

    (gradients, y), (expected_gradients, expected) = graded(narrow), graded(exact, implementation='reference')
    assert y.dtype == gradients['x'].dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float64), expected, rtol=2**-8, atol=1e-5)
    for name, value in gradients.items():
        error = jnp.linalg.norm(value.astype(jnp.float64) - expected_gradients[name])
        assert error <= 4e-3 * jnp.linalg.norm(expected_gradients[name]), name


# tokens, channels, bias, past, type, shortest slice: slices of 16 tokens and more, channels that fill no block
KERNEL_CASES = [
    ('width 4 + SiLU', 45, 130, True, False, jnp.float32, 16),
    pytest.param(('width 4 + SiLU', 7, 256, True, True, jnp.bfloat16, 256), marks=pytest.mark.slow),
    ('width 4 + SiLU', 64, 260, False, False, jnp.bfloat16, 16),
    pytest.param(('width 8 + SiLU', 33, 128, True, True, jnp.float32, 16), marks=pytest.mark.slow),
    ('taps', 70, 128, False, True, jnp.float32, 16),
    pytest.param(('taps + SiLU', 37, 100, True, False, jnp.float32, 16), marks=pytest.mark.slow),
    ('width 2', 1, 128, True, True, jnp.float32, 256),
]


@pytest.mark.parametrize('case', KERNEL_CASES, ids=str)
def test_the_gradient_kernel_equals_the_written_gradient(case, monkeypatch):
    """In Mosaic's interpreter, against the XLA form in float64."""
    shape, length, channels, with_bias, with_past, dtype, shortest = case
    options = {'silu': 'SiLU' in shape, 'residual': 'taps' in shape}
    lags = SHAPES[shape]['lags']
    rng = np.random.default_rng(length)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, dy = (normal(BATCH, length, channels).astype(dtype) for _ in range(2))
    weight = normal(len(lags), channels)
    bias = normal(channels) if with_bias else None
    past = normal(BATCH, max(lags), channels).astype(dtype) if with_past else None
    reset = rng.random((BATCH, length)) < 0.1
    reset[0, [0, length - 1]] = True
    reach = past_reach(jnp.asarray(reset)).astype(jnp.int32)
    monkeypatch.setattr(mosaic_gpu, 'SHORTEST', shortest)

    def kernel(x, dy, weight, bias, reach, past):
        with jax.enable_x64(False):
            interpret = interpreted.parameters()
            return mosaic_gpu.gradient(x, dy, weight, bias, reach, past, lags, **options, interpret=interpret)

    wide = lambda value: None if value is None else value.astype(jnp.float64)
    kept = wide(x), wide(weight), wide(bias), reach, wide(past)
    dx, dweight, dbias, _, dpast = xla._backward(lags, *options.values(), None, kept, wide(dy))
    for name, actual, expected in zip(
        ('x', 'weight', 'bias', 'past'),
        kernel(x, dy, weight, bias, reach, past),
        (dx, dweight, dbias, dpast),
        strict=True,
    ):
        if expected is None:
            assert actual is None
            continue
        tolerance = 3e-3 if actual.dtype == jnp.bfloat16 else 1e-6
        error = np.linalg.norm(np.asarray(actual, np.float64) - expected)
        assert error <= tolerance * np.linalg.norm(expected), (name, error)


def test_errors_name_the_argument():
    conv = inspect.unwrap(causal_conv1d)  # below the tests' own check of annotations
    arrays, reset = draw(0, 3, (1, 0))
    x, weight = arrays['x'], arrays['weight']
    with pytest.raises(ValueError, match="no implementation 'cuda'; available here: mosaic_gpu, blocked, xla"):
        conv(x, weight, implementation='cuda')
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it needs an NVIDIA GPU, and this is for cpu"):
        conv(x, weight, implementation='mosaic_gpu')
    with pytest.raises(ValueError, match=r'weight has shape \(2, 5\), expected \(3, 5\)'):
        conv(x, weight, lags=(0, 1, 2))
    with pytest.raises(ValueError, match=r'initial_state has shape \(2, 1, 5\), expected \(2, 4, 5\)'):
        conv(x, weight, lags=(4, 0), initial_state=arrays['initial_state'])
    with pytest.raises(ValueError, match='lags must be different numbers >= 0'):
        conv(x, weight, lags=(1, 1))
    with pytest.raises(ValueError, match="activation must be None or 'silu', got 'relu'"):
        conv(x, weight, activation='relu')
    with pytest.raises(ValueError, match='positions or reset, not both'):
        conv(x, weight, reset=reset, positions=reset)
