"""The generalised delta rule: chunks are the sequential loop, in float64, with every option and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.delta_rule import delta_rule

B, H, P, N = 2, 2, 3, 5
TOLERANCE = {'rtol': 1e-9, 'atol': 1e-10}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, length):
    """All differentiable arguments, by name, and the reset."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    key = normal(B, length, H, N)
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    arrays = {
        'x': normal(B, length, H, P),
        'log_decay': -0.6 * jax.nn.sigmoid(normal(B, length, H, N)),
        'B': normal(B, length, H, N),
        'C': normal(B, length, H, N),
        'removed': key,
        'rewritten': key * jax.nn.sigmoid(normal(B, length, H, N)),
        'initial_state': normal(B, H, P, N),
    }
    reset = rng.random((B, length)) < 0.1
    reset[1, :3] = False  # which the initial state reaches
    reset[0, [t for t in (0, 8, 32) if t < length]] = True  # first tokens of chunks, too
    return arrays, jnp.asarray(reset)


@functools.partial(jax.jit, static_argnames=('implementation', 'chunk'))
def outputs_and_gradients(arrays, reset, implementation, chunk=None):
    def loss(arrays):
        y, state = delta_rule(**arrays, reset=reset, implementation=implementation, chunk=chunk)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state)), (y, state)

    return jax.grad(loss, has_aux=True)(arrays)


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), actual, expected)


@pytest.mark.parametrize('length, chunk', [(37, 18), *map(slow, (37, 1, 65, 33, 7), (8, None, None, 32, 9))])
def test_chunks_are_the_sequential_loop(length, chunk):
    """Outputs, final state and the gradient of every array; chunks shorter and longer than a block of pairs."""
    arrays, reset = draw(length, length)
    got = outputs_and_gradients(arrays, reset, 'chunked', chunk)
    assert length < 3 or all(jnp.abs(gradient).max() > 0 for gradient in got[0].values())
    assert_close(got, outputs_and_gradients(arrays, reset, 'reference'))


def test_the_reference_is_the_written_recurrence():
    """The papers' equation, with its matrix of transition written out."""
    arrays, reset = draw(3, 6)
    a = {name: np.asarray(value) for name, value in arrays.items()}
    y, final = np.zeros((B, 6, H, P)), np.array(a['initial_state'])
    for b, h in np.ndindex(B, H):
        for t in range(6):
            at = lambda name: a[name][b, t, h]  # noqa: B023
            transition = np.diag(np.exp(at('log_decay'))) - np.outer(at('removed'), at('rewritten'))
            final[b, h] = (1 - reset[b, t]) * final[b, h] @ transition + np.outer(at('x'), at('B'))
            y[b, t, h] = final[b, h] @ at('C')
    assert_close(delta_rule(**arrays, reset=reset, implementation='reference'), (y, final))


def test_a_key_written_twice_holds_the_last_value():
    """What the rule is for: without decay and at a rate of 1 the old value of a key goes, others stay."""
    keys, values = jnp.eye(N)[jnp.array([0, 1, 0])], jnp.arange(9.0).reshape(3, P) + 1
    row = lambda value: jnp.broadcast_to(value[None, :, None], (1, 3, 1, value.shape[-1]))
    _, state = delta_rule(row(values), row(0 * keys), row(keys), row(keys), row(keys), row(keys))
    np.testing.assert_allclose(state[0, 0, :, :3], np.stack([values[2], values[1], 0 * values[0]], 1), atol=1e-12)


def test_memory_is_linear_in_the_sequence():
    """Of the compiled gradient: four times the tokens take at most about four times the memory."""

    def temporary(length):
        arrays = jax.eval_shape(lambda: draw(0, length)[0])
        gradient = jax.jit(jax.grad(lambda a: delta_rule(**a)[0].sum()))
        return gradient.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert 0 < temporary(4096) < 4.4 * temporary(1024)


def test_what_does_not_fit_is_refused_by_name():
    arrays, _ = draw(0, 4)
    with pytest.raises(ValueError, match='chunk must be at least 1'):
        delta_rule(**arrays, chunk=0)
