"""Damped waves: a filter that is a sum of some is found again; any other is met the better the more there are."""

import itertools

import numpy as np
import pytest

from mixcon_jax.distillation import modes

CHANNELS = 4


def draw(seed, states):
    rng = np.random.default_rng(seed)
    shape = (states, CHANNELS)
    return modes.Modes(rng.uniform(0.01, 0.2, shape), rng.uniform(0.1, 3, shape), rng.normal(size=(2, *shape)))


def rough(seed, length=96):
    """A filter of no few waves: noise under a window, as an untrained network makes."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(length, CHANNELS)) * np.exp(-np.arange(length)[:, None] / 20)


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('order', [0, 3])
def test_waves_are_found_again(seed, order):
    want = draw(seed, 3)
    got = modes.fit(want.filters(64), order, 1e-6)
    assert got.rate.shape == (3, CHANNELS)
    for channel in range(CHANNELS):
        mine, true = np.argsort(got.angle[:, channel]), np.argsort(want.angle[:, channel])
        for name in ('rate', 'angle', 'residue'):
            a, b = getattr(got, name)[..., channel], getattr(want, name)[..., channel]
            np.testing.assert_allclose(a[..., mine], b[..., true], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.filters(300), want.filters(300), atol=1e-6)  # beyond what was seen


def test_waves_without_a_turn_and_those_that_alternate():
    t = np.arange(40)
    filters = np.stack([0.9**t, (-0.8) ** t, 0.5 * 0.9**t - 2 * 0.3**t, 0.0 * t], 1)
    for order in (0, 2):
        got = modes.fit(filters, order, 1e-8)
        np.testing.assert_allclose(got.filters(40), filters, atol=1e-6)
        assert np.isfinite(got.residue).all() and (got.residue[:, :, 3] == 0).all()


@pytest.mark.parametrize('seed', [3, 4])
def test_more_waves_come_nearer(seed):
    filters = rough(seed)
    errors = [modes.error(filters, modes.fit(filters, order).filters(96)) for order in (1, 2, 4, 8, 16, 24)]
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[0] > 0.8 and errors[-1] < 0.03, errors


def test_a_tolerance_takes_as_many_waves_as_it_needs():
    filters = rough(5)
    fits = [modes.fit(filters, 0, tolerance) for tolerance in (0.5, 0.2, 0.05)]
    assert [len(fit.rate) for fit in fits] == sorted(len(fit.rate) for fit in fits) and len(fits[0].rate) < 12
    for fit, tolerance in zip(fits, (0.5, 0.2, 0.05), strict=True):
        assert modes.error(filters, fit.filters(96)) < 1.5 * tolerance


def test_no_wave_grows():
    """Also of a filter that does."""
    growing = 1.05 ** np.arange(50)[:, None] * np.cos(np.arange(50))[:, None]
    got = modes.fit(growing, 4)
    assert (got.rate > 0).all() and np.abs(got.filters(5000)).max() < 1e3


def test_the_error_is_relative():
    ones = np.ones((3, 2))
    assert modes.error(ones, 1.1 * ones) == pytest.approx(0.1) and modes.error(0 * ones, ones) == 0
