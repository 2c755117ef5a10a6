"""The long convolution: halves and FFTs are the sum over all lags, in float64, document by document, gradients too."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.long_conv import long_conv, xla

B, D = 2, 3
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, length, lags, past=0, documents=True):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    arrays = {'v': normal(B, length, D), 'taps': normal(lags, D), 'skip': normal(D)}
    if past:
        arrays['initial_state'] = normal(B, past, D)
    starts = (rng.random((B, length)) < 3 / length) & documents
    places = np.zeros((B, length), int)
    for b, t in np.ndindex(B, length):
        places[b, t] = 0 if starts[b, t] else places[b, t - 1] + 1 if t else past
    return arrays, jnp.asarray(places)


def direct(v, taps, skip, positions, initial_state=None):
    """A matrix [T, P + T] for every row and channel, of the taps between tokens of one document."""
    past = 0 if initial_state is None else initial_state.shape[1]
    values = v if initial_state is None else jnp.concatenate([initial_state, v], 1)
    lag = past + jnp.arange(v.shape[1])[:, None] - jnp.arange(values.shape[1])
    heard = (lag >= 0) & (lag < taps.shape[0]) & (lag <= positions[..., None])
    matrix = taps[jnp.clip(lag, 0, taps.shape[0] - 1)] * heard[..., None]
    state = None if initial_state is None else last(values, past, positions[:, -1])
    return jnp.einsum('btjd,bjd->btd', matrix, values) + skip * v, state


def last(values, count, position):
    age = jnp.arange(count - 1, -1, -1)
    return jnp.where((age <= position[:, None])[..., None], values[:, values.shape[1] - count :], 0)


@functools.partial(jax.jit, static_argnames=('function', 'implementation', 'block'))
def outputs_and_gradients(arrays, positions, function=long_conv, **options):
    def loss(arrays):
        y, state = function(**arrays, positions=positions, **options)
        return jnp.sum(jnp.sin(y)) + (0 if state is None else jnp.sum(jnp.sin(state))), (y, state)

    return jax.grad(loss, has_aux=True)(arrays)


def compare(arrays, positions, **options):
    got = outputs_and_gradients(arrays, positions, **options)
    want = outputs_and_gradients(arrays, positions, function=direct)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, want)


@pytest.mark.parametrize(
    'length, lags, past, block',
    [
        (37, 37, 0, 4),
        (21, 13, 16, 2),
        slow(1, 5, 0, 4),
        slow(1, 9, 8, 4),
        slow(301, 301, 0, 8),
        slow(300, 150, 50, None),
    ],
)
def test_halves_are_the_sum_over_all_lags(length, lags, past, block):
    compare(*draw(length, length, lags, past), implementation='halves', block=block)


def test_long_pieces_go_through_ffts_and_short_ones_do_not(monkeypatch):
    monkeypatch.setattr(xla, 'PRODUCT_UP_TO', 4)
    text = str(jax.make_jaxpr(lambda v, taps: long_conv(v, taps, block=2)[0])(jnp.ones((1, 19, D)), jnp.ones((19, D))))
    assert text.count('fft[') == 3 * 2 and text.count('dot_general[') == 2  # of halves of 8 and 16; of 2 and 4
    compare(*draw(8, 19, 19), implementation='halves', block=2)


@pytest.mark.parametrize('documents', [slow(False), True])
def test_one_fft_of_a_row_where_rows_are_documents_and_halves_where_not(documents):
    arrays, positions = draw(5, 23, 23, documents=documents)
    assert bool(jnp.all(positions == jnp.arange(23))) is not documents
    compare(arrays, positions, implementation='fft', block=8)


@pytest.mark.parametrize('past', [slow(0), 7])
def test_the_reference_is_the_sum_over_all_lags(past):
    compare(*draw(6, 9, 9, past), implementation='reference')


def test_no_later_token_is_heard_by_rounding():
    """Also not one that is not a number."""
    arrays, positions = draw(7, 40, 40)
    run = jax.jit(lambda v: long_conv(v, arrays['taps'], positions=positions, block=2)[0])
    for t in (1, 17, 32):
        changed = arrays['v'].at[:, t:].set(jnp.nan)
        assert (run(changed)[:, :t] == run(arrays['v'])[:, :t]).all()


def test_padding_does_not_enter_the_state():
    arrays, _ = draw(8, 6, 9, past=5)
    mask = jnp.asarray([[True] * 4 + [False] * 2, [False] * 6])
    positions = jnp.where(mask, 5 + jnp.arange(6), 0)
    _, state = long_conv(**arrays, positions=positions, mask=mask)
    values = jnp.concatenate([arrays['initial_state'], arrays['v']], 1)
    np.testing.assert_array_equal(state, jnp.stack([values[0, 4:9], values[1, :5]]))


def test_what_does_not_fit_is_refused():
    conv = inspect.unwrap(long_conv)  # below the tests' own check of annotations
    with pytest.raises(ValueError, match='taps'):
        conv(jnp.ones((1, 2, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match='block'):
        long_conv(jnp.ones((1, 2, 3)), jnp.ones((2, 3)), block=0)
