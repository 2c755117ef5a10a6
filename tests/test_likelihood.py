"""Likelihoods of endings: those of the whole softmax of each text by itself, whatever stands beside it."""

import numpy as np
import pytest

from mixcon_jax.inference import likelihood
from mixcon_jax.inference.likelihood import Ending, likelihoods, rounded_up
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import create
from tests.models.cases import called, model_config, perturbed


@pytest.fixture(scope='module')
def model():
    pattern = ('conba+moe', 'attention+mlp')
    return perturbed(create(model_config({'pattern': pattern, 'attention.rope': True}), 0), 1, scale=0.3)


def logits_of(model, text):
    """In a row of one length, to compile once: what comes after a token changes nothing."""
    tokens = np.zeros((1, 37), np.int32)
    tokens[0, : len(text)] = text
    return np.asarray(model.logits(called(model, tokens, Context.whole(1, 37))[0])[0], np.float64)[: len(text)]


def by_softmax(model, ending):
    """The sum of log-probabilities, and whether each is the highest, in float64 from the logits of the text alone."""
    logits, targets = logits_of(model, ending.tokens)[:-1], np.asarray(ending.tokens[1:])
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(len(targets))[len(targets) - ending.scored :]
    return log[rows, targets[rows]].sum(), all(logits[row].argmax() == targets[row] for row in rows)


@pytest.mark.parametrize('chunk', [2**26, 1000], ids=['at once', 'in chunks'])
def test_each_ending_has_the_likelihood_that_it_has_alone(model, monkeypatch, chunk):
    monkeypatch.setattr(likelihood, 'LOGITS', chunk)
    likelihood._score.clear_cache()
    rng = np.random.default_rng(3)
    endings = [
        Ending(rng.integers(0, 60, length).tolist(), scored)
        for length, scored in [(9, 3), (2, 1), (37, 36), (5, 0), (9, 8)]
    ]
    text = rng.integers(0, 60, 6).tolist()  # whose ending is made the likeliest
    for _ in range(3):
        text.append(int(logits_of(model, text)[-1].argmax()))
    endings.append(Ending(text, 3))
    counts = []
    found = likelihoods(model, endings, 4, done=counts.append)
    assert counts == [4, 6] and found[3] == (0.0, True)
    for one, ending in zip(found, endings, strict=True):
        log, greedy = by_softmax(model, ending) if ending.scored else (0.0, True)
        assert one.log == pytest.approx(log, rel=1e-5, abs=1e-5) and one.greedy == greedy
    assert found[-1].greedy and not found[2].greedy


def test_few_lengths_are_compiled_for_and_none_is_half_as_long_again():
    lengths = np.arange(1, 5000)
    rounded = np.array([rounded_up(int(length)) for length in lengths])
    assert (rounded >= lengths).all() and (rounded[32:] < 1.5 * lengths[32:]).all() and len(set(rounded)) == 16
    assert rounded_up(48) == 48 and rounded_up(33) == 48 and rounded_up(49) == 64
