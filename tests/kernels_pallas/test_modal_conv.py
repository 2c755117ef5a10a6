"""The modal convolution: chunks and steps are the sum over all earlier tokens, in float64, gradients too."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.modal_conv import modal_conv

B, D, S = 2, 5, 3
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, length):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    arrays = {
        'v': normal(B, length, D), 'rate': 0.3 * normal(S, D) ** 2, 'angle': normal(S, D), 'residue': normal(2, S, D),
        'skip': normal(D), 'initial_state': normal(B, 2, S, D),
    }  # fmt: skip
    reset, mask = rng.random((B, length)) < 0.1, rng.random((B, length)) < 0.9
    return arrays, jnp.asarray(reset & mask), jnp.asarray(mask)


def direct(v, rate, angle, residue, skip, initial_state, reset, mask):
    """Of every pair of tokens the filter between them, if both are real and no document starts in between."""
    waves = lambda lag: jnp.exp((-rate + 1j * angle) * lag[..., None, None])  # [..., S, D]
    R, state = residue[0] + 1j * residue[1], initial_state[:, 0] + 1j * initial_state[:, 1]
    places, documents = jnp.cumsum(mask, 1), jnp.cumsum(reset, 1)
    lag = places[:, :, None] - places[:, None]
    heard = (lag >= 0) & (documents[:, :, None] == documents[:, None]) & mask[:, None]
    heard = heard & jnp.tri(v.shape[1], dtype=bool)
    h = jnp.real(jnp.sum(R * waves(lag * heard), 3)) * heard[..., None]
    carried = jnp.real(jnp.sum(R * waves(places) * state[:, None], 2)) * (documents == 0)[..., None]
    y = jnp.einsum('btjd,bjd->btd', h, v) + carried + skip * v
    last = (
        waves((places[:, -1:] - places) * (documents == documents[:, -1:]))
        * (mask & (documents == documents[:, -1:]))[..., None, None]
    )
    final = jnp.einsum('btsd,btd->bsd', last, v)
    final = final + waves(places[:, -1]) * state * (documents[:, -1] == 0)[:, None, None]
    return y, jnp.stack([final.real, final.imag], 1)


@functools.partial(jax.jit, static_argnames=('function', 'implementation', 'chunk'))
def outputs_and_gradients(arrays, reset, mask, function=modal_conv, **options):
    def loss(arrays):
        y, state = function(**arrays, reset=reset, mask=mask, **options)
        y = jnp.where(mask[..., None], y, 0)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state)), (y, state)

    return jax.grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize(
    'length, chunk, given',
    [(21, 8, True), slow(21, 8, False), slow(2, 8, True), slow(64, 16, True), slow(129, None, True)],
)
def test_all_chunks_at_once_are_the_sum_over_the_past(length, chunk, given):
    arrays, reset, mask = draw(length, length)
    everyone = jnp.ones_like(mask)
    if not given:
        arrays['initial_state'] = jnp.zeros_like(arrays['initial_state'])
    want = outputs_and_gradients(arrays, reset, everyone, function=direct)
    options = {'implementation': 'parallel', 'chunk': chunk}
    got = outputs_and_gradients(arrays, reset, everyone, function=unmasked if given else stateless, **options)
    if not given:
        for gradients in (got[0], want[0]):
            del gradients['initial_state']
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, want)


def unmasked(mask, **arrays):
    return modal_conv(**arrays)


def stateless(mask, initial_state, **arrays):
    return modal_conv(**arrays)


CASES = [('reference', None, 9), ('chunked_stepped', 4, 21), ('chunked_associative', 4, 21)]
LATE = [(name, chunk, length) for name, chunk, _ in CASES for length in (1, 64, 129)]


@pytest.mark.parametrize('implementation, chunk, length', [*CASES, *(slow(*case) for case in LATE)])
def test_states_are_the_sum_over_the_past(implementation, chunk, length):
    arrays, reset, mask = draw(length, length)
    got = outputs_and_gradients(arrays, reset, mask, implementation=implementation, chunk=chunk)
    want = outputs_and_gradients(arrays, reset, mask, function=direct)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, want)


def test_a_mode_is_a_damped_wave():
    """The response to one unit, without anything of the above: numpy's own complex powers."""
    arrays, _, _ = draw(3, 12)
    rate, angle, residue, skip = (np.asarray(arrays[name]) for name in ('rate', 'angle', 'residue', 'skip'))
    unit = jnp.zeros((1, 12, D)).at[0, 2].set(1)
    y, _ = modal_conv(unit, arrays['rate'], arrays['angle'], arrays['residue'], skip=arrays['skip'])
    pole, want = np.exp(-rate) * (np.cos(angle) + 1j * np.sin(angle)), np.zeros((12, D))
    for t in range(2, 12):
        want[t] = np.sum((residue[0] + 1j * residue[1]) * pole ** (t - 2), 0).real + (t == 2) * skip
    np.testing.assert_allclose(y[0], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    'bad, message',
    [
        ({'residue': jnp.ones((3, S, D))}, 'residue'),
        ({'chunk': 0}, 'chunk'),
        ({'chunk': 24, 'implementation': 'parallel'}, '4 times a power of two'),
    ],
)
def test_what_does_not_fit_is_refused(bad, message):
    arrays, _, _ = draw(0, 2)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(modal_conv)(**(arrays | bad))  # below the tests' own check of annotations
