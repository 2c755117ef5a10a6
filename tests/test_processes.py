"""What processes tell one another: each is a call here, in which JAX's exchange gives what the others sent."""

import itertools

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from mixcon_jax import config as configs
from mixcon_jax import startup
from mixcon_jax.data.synthetic import tokenizer
from mixcon_jax.errors import UserError
from mixcon_jax.host import processes


@pytest.fixture
def pair(monkeypatch):
    """Two processes, of which the first speaks first: it broadcasts a size, and what has it."""
    sent, calls = [], itertools.count()

    def broadcast(own: np.ndarray) -> np.ndarray:
        index = next(calls)
        if index < 2:
            sent.append(own)
        assert np.shape(own) == np.shape(sent[index % 2])
        return sent[index % 2]

    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(multihost_utils, 'broadcast_one_to_all', broadcast)


@pytest.mark.parametrize('other', [[6, 4], [], [1] * 5000])
def test_all_have_what_the_first_has(pair, other):
    assert processes.of_first([4, 2]) == [4, 2]
    assert processes.of_first(other) == [4, 2]


def test_all_have_what_each_says(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 3)
    monkeypatch.setattr(multihost_utils, 'process_allgather', lambda own: np.stack([own, 0 * own, own]))
    assert processes.of_each('größer') == ['größer', '', 'größer']
    assert processes.of_each('é' * 400)[0] == 'é' * 256


DIFFERENT = [
    ({'name': 'x', 'log.every': 3, 'data.cache_dir': '/b', 'data.sources': ('files:/b/*.txt',)}, ''),
    ({'optim.learning_rate': 0.5, 'eval.every': 3}, r'process 1 .*: eval.every, optim.learning_rate; give'),
]


@pytest.fixture
def second(monkeypatch):
    """What a call says first is the first process's; from the second call on, the second's."""
    said = []
    monkeypatch.setattr(processes, 'of_first', lambda own: said.append(own) or said[0])
    monkeypatch.setattr(processes, 'of_each', lambda own: [own] if len(said) == 1 else ['', own])


@pytest.mark.parametrize('changes, words', DIFFERENT)
def test_a_process_with_another_run_to_make_is_named_with_what_differs(second, changes, words):
    config = configs.default()
    startup.require_same_options(config)
    for key, value in changes.items():
        configs.put(config, key, value)
    if not words:
        startup.require_same_options(config)
        return
    with pytest.raises(UserError, match=words):
        startup.require_same_options(config)


def test_a_process_with_other_text_is_named(second):
    letters = tokenizer(configs.default().data)
    for _ in range(2):
        startup.require_same_text(('a',), letters)
    with pytest.raises(UserError, match=r'process 1 .*: the tokens; give all the same text'):
        startup.require_same_text(('b',), letters)


def test_without_jaxs_service_nobody_is_told_to_stop(monkeypatch):
    def off(count):
        raise RuntimeError('preemption sync manager has not been initialized')

    monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', off)
    assert processes.told_to_stop(1) is False
