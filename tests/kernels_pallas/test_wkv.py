"""RWKV-4's weighted mean: chunks are the sequential loop, and that the plain sums, in float64, with every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.wkv import wkv

B, D = 2, 5
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, length):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    arrays = {'k': 3 * normal(B, length, D), 'v': normal(B, length, D), 'decay': normal(D) ** 2, 'bonus': normal(D)}
    arrays['initial_state'] = jnp.stack([normal(B, D), jnp.abs(normal(B, D)), normal(B, D)], 1)
    reset, mask = rng.random((B, length)) < 0.1, rng.random((B, length)) < 0.9
    return arrays, jnp.asarray(reset & mask), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames=('implementation', 'chunk'))
def outputs_and_gradients(arrays, reset, mask, implementation, chunk):
    def loss(arrays):
        y, state = wkv(**arrays, reset=reset, mask=mask, implementation=implementation, chunk=chunk)
        y = jnp.where(mask[..., None], y, 0)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state[:, :2])), (y, state)

    return jax.grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize('length', [slow(1), 21, slow(129)])
@pytest.mark.parametrize('implementation', ['chunked_stepped', 'chunked_associative'])
def test_chunks_are_the_sequential_loop(implementation, length):
    arrays, reset, mask = draw(length, length)
    got = outputs_and_gradients(arrays, reset, mask, implementation, 4)
    want = outputs_and_gradients(arrays, reset, mask, 'reference', None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, want)


def test_the_loop_is_the_mean_with_its_weights():
    """Weights written out, for every token and document."""
    arrays, reset, mask = draw(5, 9)
    k, v, w, u, initial = (np.asarray(arrays[name]) for name in ('k', 'v', 'decay', 'bonus', 'initial_state'))
    got, _ = wkv(**arrays, reset=reset, mask=mask, implementation='reference')
    for b, t in np.argwhere(np.asarray(mask)):
        starts = np.flatnonzero(np.asarray(reset)[b, : t + 1])
        first = starts[-1] if starts.size else 0
        past = [s for s in range(first, t) if mask[b, s]]
        weights = [np.exp(k[b, s] - (len(past) - 1 - i) * w) for i, s in enumerate(past)]
        top, bottom = sum(e * v[b, s] for e, s in zip(weights, past)), sum(weights)
        if not starts.size:
            carried = np.exp(initial[b, 2] - len(past) * w)
            top, bottom = top + carried * initial[b, 0], bottom + carried * initial[b, 1]
        own = np.exp(k[b, t] + u)
        np.testing.assert_allclose(got[b, t], (top + own * v[b, t]) / (bottom + own), rtol=1e-10)


@pytest.mark.parametrize('implementation', [slow('chunked_stepped'), 'chunked_associative'])
def test_large_exponents_do_not_overflow(implementation):
    arrays, reset, mask = draw(6, 17)
    small = {name: value.astype(jnp.float32) for name, value in arrays.items()}
    small['k'] = small['k'] * 100
    gradients, (y, state) = outputs_and_gradients(small, reset, mask, implementation, 8)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, y, state)))
    wide = {name: value.astype(jnp.float64) for name, value in small.items()}
    _, (want, _) = outputs_and_gradients(wide, reset, mask, 'reference', None)
    np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4)
