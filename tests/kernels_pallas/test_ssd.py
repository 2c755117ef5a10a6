"""Linear attention with decay: chunks are the sequential loop, in float64, with every option and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.ssd import ssd, xla

B, H, P, G, N = 2, 4, 3, 2, 5
TOLERANCE = {'rtol': 1e-9, 'atol': 1e-10}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, length, by_key, strength=1.0):
    """All differentiable arguments, by name, and the reset."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    arrays = {
        'x': normal(B, length, H, P),
        'log_decay': -strength * jnp.abs(normal(B, length, H, *((N,) if by_key else ()))),
        'B': normal(B, length, G, N),
        'C': normal(B, length, G, N),
        'step': jnp.abs(normal(B, length, H)),
        'initial_state': normal(B, H, P, N),
    }
    reset = rng.random((B, length)) < 0.1
    reset[0, [t for t in (0, 8, 63) if t < length]] = True  # first tokens of chunks, too
    return arrays, jnp.asarray(reset)


@functools.partial(jax.jit, static_argnames=('implementation', 'chunk', 'exclusive'))
def outputs_and_gradients(arrays, reset, implementation, chunk, exclusive=False):
    def loss(arrays):
        y, state = ssd(**arrays, reset=reset, exclusive=exclusive, implementation=implementation, chunk=chunk)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state)), (y, state)

    return jax.grad(loss, has_aux=True)(arrays)


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), actual, expected)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize('by_key', [False, True], ids=['by head', 'by key'])
@pytest.mark.parametrize('length, chunk', [(37, 32), *map(slow, (37, 1, 64, 129, 7), (8, None, None, 64, 9))])
def test_chunks_are_the_sequential_loop(by_key, length, chunk):
    """Outputs, final state and the gradient of every array; chunks shorter and longer than a block of pairs."""
    arrays, reset = draw(length, length, by_key)
    got = outputs_and_gradients(arrays, reset, 'chunked', chunk)
    assert_close(got, outputs_and_gradients(arrays, reset, 'reference', None))


@pytest.mark.parametrize('by_key', [False, True], ids=['by head', 'by key'])
def test_chunks_computed_together_are_the_sequential_loop(by_key, monkeypatch):
    """As a GPU takes them: rounds of several chunks, the last of them not full."""
    monkeypatch.setattr(xla, 'chunks_together', lambda length, chunk: 3)
    arrays, reset = draw(11, 37, by_key)
    got = outputs_and_gradients(arrays, reset, 'chunked', 5)
    assert_close(got, outputs_and_gradients(arrays, reset, 'reference', None))


@pytest.mark.parametrize('by_key', [slow(False), True], ids=['by head', 'by key'])
def test_chunks_read_the_state_before_a_token_as_the_sequential_loop_does(by_key):
    arrays, reset = draw(12, 37, by_key)
    got = outputs_and_gradients(arrays, reset, 'chunked', 18, exclusive=True)
    assert_close(got, outputs_and_gradients(arrays, reset, 'reference', None, exclusive=True))


def test_a_gpu_takes_many_chunks_a_round(monkeypatch):
    assert xla.chunks_together(4096, 64) == 1
    monkeypatch.setattr(xla.platform, 'platform', lambda: 'gpu')
    assert [xla.chunks_together(*sizes) for sizes in ((4096, 64), (130, 64), (8192, 2048))] == [16, 3, 1]


@pytest.mark.parametrize('by_key', [False, True], ids=['by head', 'by key'])
def test_gradients_of_bfloat16_round_as_their_products_do(by_key):
    """Within a few roundings of float64's, of the same arguments."""
    arrays, reset = draw(5, 64, by_key)
    narrow = {k: v.astype(jnp.bfloat16 if k in ('x', 'B', 'C') else jnp.float32) for k, v in arrays.items()}
    got = outputs_and_gradients(narrow, reset, 'chunked', 32)[0]
    want = outputs_and_gradients({k: v.astype(jnp.float64) for k, v in narrow.items()}, reset, 'reference', None)[0]
    for name in narrow:
        assert got[name].dtype == narrow[name].dtype
        error, size = np.linalg.norm(np.float64(got[name]) - want[name]), np.linalg.norm(want[name])
        assert error <= 0.03 * size, (name, error, size)


@pytest.mark.parametrize('by_key', [False, True], ids=['by head', 'by key'])
def test_the_reference_is_the_written_recurrence(by_key):
    """The equation, one number at a time."""
    arrays, reset = draw(3, 6, by_key)
    x = {name: np.asarray(value) for name, value in arrays.items()}
    (y, before), final = np.zeros((2, B, 6, H, P)), np.array(x['initial_state'])
    for b, h, p in np.ndindex(B, H, P):
        g = h // (H // G)
        for t in range(6):
            for n in range(N):
                old = 0 if reset[b, t] else final[b, h, p, n]
                decay = np.exp(x['log_decay'][b, t, h, n] if by_key else x['log_decay'][b, t, h])
                before[b, t, h, p] += old * x['C'][b, t, g, n]
                final[b, h, p, n] = decay * old + x['step'][b, t, h] * x['x'][b, t, h, p] * x['B'][b, t, g, n]
                y[b, t, h, p] += final[b, h, p, n] * x['C'][b, t, g, n]
    assert_close(ssd(**arrays, reset=reset, implementation='reference'), (y, final))
    assert_close(ssd(**arrays, reset=reset, exclusive=True, implementation='reference'), (before, final))


@pytest.mark.parametrize('by_key', [slow(False), True], ids=['by head', 'by key'])
def test_a_token_that_forgets_all_costs_no_digits_of_what_follows(by_key):
    """In float32, with decays of e^-50 and of e^-0.001 in one chunk; differences of plain sums lose three digits."""
    arrays, _ = draw(4, 64, by_key)
    steep = jnp.where(jnp.arange(64) < 24, -50.0, -1e-3)
    arrays['log_decay'] = jnp.broadcast_to(steep.reshape(1, -1, *(1,) * (1 + by_key)), arrays['log_decay'].shape)
    narrow = {name: value.astype(jnp.float32) for name, value in arrays.items()}
    (y, state), gradients = outputs_and_gradients(narrow, None, 'chunked', 64)[::-1]
    (want_y, want_state), want = outputs_and_gradients(
        {name: value.astype(jnp.float64) for name, value in narrow.items()}, None, 'reference', None
    )[::-1]
    pairs = ((y, want_y, 2e-6), (state, want_state, 2e-6), *((gradients[k], want[k], 2e-5) for k in ('x', 'B', 'C')))
    for got, wanted, share in pairs:
        assert got.dtype == jnp.float32
        assert jnp.abs(got - wanted).max() < share * jnp.abs(wanted).max()


def test_memory_is_linear_in_the_sequence():
    """Of the compiled gradient: four times the tokens take at most about four times the memory."""

    def temporary(length):
        arrays = jax.eval_shape(lambda: draw(0, length, False)[0])
        return (
            jax.jit(jax.grad(lambda a: ssd(**a)[0].sum())).lower(arrays).compile().memory_analysis().temp_size_in_bytes
        )

    assert 0 < temporary(4096) < 4.4 * temporary(1024)


def test_what_does_not_fit_is_refused_by_name():
    arrays, _ = draw(0, 4, False)
    with pytest.raises(ValueError, match=r'3 groups, expected a divisor of the 4 heads'):
        ssd(**arrays | {'B': jnp.zeros((B, 4, 3, N)), 'C': jnp.zeros((B, 4, 3, N))})
    with pytest.raises(ValueError, match='chunk must be at least 1'):
        ssd(**arrays, chunk=0)
