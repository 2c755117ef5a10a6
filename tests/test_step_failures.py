"""Steps that go wrong: what is not finite changes nothing, counts and is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcon_jax.runs.fingerprint import fingerprint
from mixcon_jax.trees import map_named, named_leaves
from tests.test_step import LENGTH, Plain, assert_identical, host, steps_of
from tests.training import random_batch, step_config


# ----- steps that go wrong -----
def test_a_step_without_finite_loss_changes_nothing_and_counts():
    config = step_config(model__moe__balance='bias', optim__warmup_steps=10)
    steps = steps_of(config)
    batch = steps.put(random_batch(6, 8, LENGTH))
    good, _ = steps.train_step(steps.init_state(), batch)
    good = host(good)
    poison = lambda name, x: np.full_like(x, np.inf) if name == 'embedding' else x
    poisoned = dataclasses.replace(good, params=map_named(poison, good.params))
    state = jax.device_put(poisoned)
    for count in (1, 2):
        state, metrics = steps.train_step(state, batch)
        assert metrics['bad'] and metrics['bad_steps'] == metrics['skipped'] == count
        assert int(state.step) == 1 + count
        np.testing.assert_allclose(metrics['learning_rate'], 0.05 * (1 + count) / 10, rtol=1e-6)
    for part in ('params', 'buffers', 'opt_state'):
        assert_identical(getattr(state, part), getattr(poisoned, part))
    cured = dataclasses.replace(state, params=jax.device_put(good.params))
    cured, metrics = steps.train_step(cured, batch)
    assert not metrics['bad'] and (metrics['bad_steps'], metrics['skipped']) == (0, 2)
    assert int(cured.step) == 4 and fingerprint(cured.params) != fingerprint(good.params)


class InfiniteSlope(Plain):
    """The root of a parameter that is zero: a finite loss with an infinite gradient."""

    def add(self, context):
        return jnp.sqrt(self.extra[...])


def test_a_finite_loss_with_an_infinite_gradient_is_skipped_too():
    steps = steps_of(step_config(), create=InfiniteSlope)
    state = steps.init_state()
    before = host(state)
    state, metrics = steps.train_step(state, steps.put(random_batch(7, 8, LENGTH)))
    assert np.isfinite(metrics['loss']) and metrics['bad'] and metrics['skipped'] == 1 and not metrics['broken']
    for part in ('params', 'buffers', 'opt_state'):
        assert_identical(getattr(state, part), getattr(before, part))


@pytest.mark.parametrize('optimizer', ['adamw', 'lion'])
def test_an_update_that_is_not_finite_is_told_though_its_gradient_is(optimizer):
    """A rate that float32 cannot hold becomes infinite only when parameters are updated."""
    steps = steps_of(step_config(optim__name=optimizer, optim__learning_rate=1e39), create=Plain)
    state, metrics = steps.train_step(steps.init_state(), steps.put(random_batch(7, 8, LENGTH)))
    assert not metrics['bad'] and metrics['broken']
    assert not all(np.isfinite(leaf).all() for leaf in named_leaves(state.params).values())


def test_an_empty_batch_gives_no_gradient():
    steps = steps_of(step_config(optim__weight_decay=0.0), create=Plain)
    batch = {key: np.zeros_like(value) for key, value in random_batch(8, 8, LENGTH).items()}
    state, metrics = steps.train_step(steps.init_state(), steps.put(batch))
    assert not metrics['bad'] and metrics['loss'] == metrics['tokens'] == metrics['grad_norm'] == 0
    assert fingerprint(state.params) == fingerprint(steps.init_state().params)
