"""Selective scan: every implementation is the sequential loop, in float64, with every option and gradient."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.selective_scan import selective_scan

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

B, D, N = 2, 5, 4
TOLERANCE = {'rtol': 1e-10, 'atol': 1e-11}
FAST = ('associative', 'chunked_associative', 'chunked_stepped')


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, length, delay=False):
    """All differentiable arguments, by name; the reset; dt is 0 at some tokens, as padding has it."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    dt = np.log1p(np.exp(rng.normal(size=(B, length, D)) - 1))
    dt[:, rng.random(length) < 0.15] = 0
    arrays = {
        'u': normal(B, length, D),
        'dt': jnp.asarray(dt),
        'A': -jnp.exp(normal(D, N)),
        'B': normal(B, length, N),
        'C': normal(B, length, N),
        'D': normal(D),
        'initial_state': normal(*((B, 2, D, N) if delay else (B, D, N))),
    }
    reset = rng.random((B, length)) < 0.1
    reset[0, [t for t in (0, 4, 8, 63) if t < length]] = True  # first tokens of chunks, too
    return arrays, jnp.asarray(reset), normal


def call(arrays, implementation='chunked_stepped', chunk=4, reset=None, prior=False, **options):
    options |= {'implementation': implementation, 'chunk': chunk, 'prior': prior}
    return jax.jit(lambda *args: _call(*args, **options))(arrays, reset)


def _call(arrays, reset, **options):
    names = ('u', 'dt', 'A', 'B', 'C')
    arrays = dict(arrays)
    readout = tuple(arrays.pop(name, None) for name in ('Z', 'g', 'F'))
    if any(part is not None for part in readout):
        options['readout'] = readout
    args = [arrays.pop(name) for name in names]
    return selective_scan(*args, **arrays, reset=reset, **options)


def outputs_and_gradients(arrays, seed, **options):
    def loss(arrays):
        outputs = call(arrays, **options)
        weights = [jax.random.normal(jax.random.key(seed + i), y.shape) for i, y in enumerate(outputs)]
        return sum(jnp.vdot(weight, jnp.sin(y)) for weight, y in zip(weights, outputs)), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE)), actual, expected)


def with_options(name, seed, length):
    arrays, reset, normal = draw(seed, length, delay='delay' in name)
    options = {}
    if name != 'plain':
        options = {'reset': reset, 'prior': True}
    if 'readout' in name:
        arrays |= {'Z': normal(N, N), 'g': normal(N), 'F': normal(N, N)}
    if 'delay' in name:
        arrays['delay'] = jax.nn.sigmoid(normal(D))
    if 'noise' in name:
        options['process_noise'] = (jax.random.key(seed), 0.1)
    return arrays, options


CASES = [
    ('plain', 129), slow('packed', 7), slow('packed', 64), slow('packed readout', 11), ('packed delay', 1),
    ('packed readout delay noise', 17),
]  # fmt: skip


@pytest.mark.parametrize('name, length', CASES)
def test_equals_the_sequential_reference(name, length):
    """Outputs, final state, a-priori outputs and the gradient of every array."""
    arrays, options = with_options(name, length, length)
    expected = outputs_and_gradients(arrays, 3, implementation='reference', **options)
    for implementation in FAST:
        assert_close(outputs_and_gradients(arrays, 3, implementation=implementation, **options), expected)


@pytest.mark.parametrize('seed', range(3))
def test_reference_is_the_written_recurrence(seed):
    """The equations, one number at a time."""
    length = 6
    arrays, options = with_options('packed readout delay', seed, length)
    x = {name: np.asarray(value) for name, value in arrays.items()}
    y, prior = np.zeros((B, length, D)), np.zeros((B, length, D))
    final = np.zeros((B, 2, D, N))
    swish = lambda v: v / (1 + np.exp(-v))
    for b in range(B):
        for d in range(D):
            newest, older = x['initial_state'][b, :, d]
            for t in range(length):
                dt, m = x['dt'][b, t, d], x['delay'][d]
                if options['reset'][b, t]:
                    newest, older = np.zeros(N), np.zeros(N)
                carried = newest
                if dt > 0:
                    carried = np.exp(dt * x['A'][d]) * ((1 - m) * newest + m * older)
                    newest, older = carried + dt * x['u'][b, t, d] * x['B'][b, t], newest
                scaled = newest * swish(x['Z'] @ newest + x['g'])
                scaled = scaled + x['F'] @ scaled
                y[b, t, d] = scaled @ x['C'][b, t] + x['D'][d] * x['u'][b, t, d]
                prior[b, t, d] = carried @ x['C'][b, t]
            final[b, :, d] = newest, older
    assert_close(call(arrays, 'reference', **options), (y, final, prior))


@pytest.mark.parametrize('name', ['plain', 'packed delay'])
@pytest.mark.parametrize('cut', [1, 4, 7])
def test_a_call_in_two_equals_one_call(name, cut):
    length = 11
    arrays, options = with_options(name, cut, length)
    time_axis = ('u', 'dt', 'B', 'C', 'reset')
    part = lambda tree, window: {k: v[:, window] if k in time_axis else v for k, v in tree.items()}
    whole = call(arrays, **options)
    y, state, *prior = call(part(arrays, slice(cut)), **part(options, slice(cut)))
    rest = part(arrays, slice(cut, None)) | {'initial_state': state}
    y2, state2, *prior2 = call(rest, **part(options, slice(cut, None)))
    join = lambda a, b: jnp.concatenate([a, b], 1)
    assert_close((join(y, y2), state2, *map(join, prior, prior2)), whole)


@pytest.mark.parametrize('lengths', [(3, 5, 1), (4, 4, 1), (1, 1, 7)], ids=str)
@pytest.mark.parametrize('implementation', ['chunked_stepped', 'chunked_associative'])
def test_packed_documents_equal_separate_ones(lengths, implementation):
    """Outputs and gradients, with documents that start before, at and after the border of a chunk of 4."""
    length = sum(lengths)
    arrays, _, _ = draw(sum(lengths), length)
    del arrays['initial_state']
    starts = np.cumsum((0, *lengths))[:-1]
    reset = jnp.zeros((B, length), bool).at[:, starts].set(True)
    weight = jax.random.normal(jax.random.key(1), (B, length, D))
    run = lambda arrays, **options: call(arrays, implementation, 4, **options)[0]

    def separate(arrays):
        cut = lambda start, n: {
            k: v[:, start : start + n] if k in ('u', 'dt', 'B', 'C') else v for k, v in arrays.items()
        }
        return jnp.concatenate([run(cut(start, n)) for start, n in zip(starts, lengths)], 1)

    graded = lambda f: jax.jit(jax.value_and_grad(lambda arrays: jnp.vdot(weight, f(arrays))))(arrays)
    assert_close(graded(lambda arrays: run(arrays, reset=reset)), graded(separate))


def test_zero_steps_leave_the_state_untouched():
    arrays, options = with_options('packed delay noise', 0, 5)
    arrays['dt'] = jnp.zeros_like(arrays['dt'])
    options['reset'] = None
    for implementation in ('reference', *FAST):
        _, state, _ = call(arrays, implementation, **options)
        np.testing.assert_array_equal(state, arrays['initial_state'])


def test_noise_does_not_depend_on_the_chunk():
    arrays, _ = with_options('plain', 0, 5)
    noisy = [call(arrays, chunk=c, process_noise=(jax.random.key(1), 0.5)) for c in (1, 3)]
    assert_close(noisy[1], noisy[0])
    assert jnp.abs(noisy[0][0] - call(arrays)[0]).max() > 0.1


@pytest.mark.parametrize('readout', [False, True])
def test_long_bfloat16_gradients_are_finite_and_states_never_exist_at_once(readout):
    """T = 4096: finite gradients, float32 results, and temporaries well below one [B, T, D, N] buffer."""
    length, channels, states = 4096, 32, 16
    keys = jax.random.split(jax.random.key(0), 4)
    half = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
    args = (
        half(keys[0], 1, length, channels),
        jax.nn.softplus(half(keys[1], 1, length, channels)),
        jnp.broadcast_to(-jnp.arange(1.0, states + 1, dtype=jnp.float32), (channels, states)),
        half(keys[2], 1, length, states),
        half(keys[3], 1, length, states),
    )
    options = {'readout': (jnp.eye(states), jnp.ones(states), None)} if readout else {}
    loss = lambda *args: jnp.sum(jnp.sin(selective_scan(*args, **options)[0]))
    compiled = jax.jit(jax.grad(loss, argnums=tuple(range(5)))).lower(*args).compile()
    assert all(bool(jnp.isfinite(g).all()) for g in compiled(*args))
    y, state = selective_scan(*args, **options)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * 4 * length * channels * states


def test_errors_name_the_argument():
    scan = inspect.unwrap(selective_scan)  # below the tests' own check of annotations
    arrays, _, _ = draw(0, 3)
    args = [arrays[name] for name in ('u', 'dt', 'A', 'B', 'C')]
    with pytest.raises(
        ValueError, match="no implementation 'cuda'; available here: mosaic_gpu_scaled, mosaic_gpu, chunked, "
    ):
        scan(*args, implementation='cuda')
    with pytest.raises(ValueError, match=r'B has shape \(2, 2, 4\), expected \(2, 3, 4\)'):
        scan(*args[:3], args[3][:, :2], args[4])
    with pytest.raises(ValueError, match=r'initial_state has shape .* expected \(2, 2, 5, 4\)'):
        scan(*args, initial_state=arrays['initial_state'], delay=arrays['D'])
    with pytest.raises(ValueError, match=r'readout Z has shape \(3, 3\), expected \(4, 4\)'):
        scan(*args, readout=(jnp.eye(3), jnp.ones(4), None))
    with pytest.raises(ValueError, match=r'D has shape \(4,\), expected \(5,\)'):
        scan(*args, D=jnp.ones(4))
    with pytest.raises(ValueError, match='chunk must be at least 1'):
        scan(*args, chunk=0)
