"""Generation: batched prompts get the tokens they get alone, and sampling keeps to its filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.errors import UserError
from mixcon_jax.inference.generate import Sampling, generate, left_padded, sample
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import create
from tests.models.cases import called, model_config, perturbed

PROMPTS = [[0, 5, 9, 3, 7, 1], [0, 8], [0, 2, 4, 6]]
VOCAB = 60


@pytest.fixture(scope='module')
def model():
    pattern = ('conba+moe', 'attention+mlp', 'mamba')
    return perturbed(create(model_config({'pattern': pattern, 'attention.rope': True}), 0), 1, scale=0.2)


def run(model, prompts, sampling, seeds, count=6):
    return np.stack(list(generate(model, prompts, count, sampling, seeds, VOCAB)), axis=1)


# Greedy decoding has a test of its own below.
GREEDY = pytest.param(Sampling(temperature=0), marks=pytest.mark.slow)


@pytest.mark.parametrize('sampling', [GREEDY, Sampling(1.3, top_k=20, top_p=0.9)], ids=str)
def test_prompts_of_unequal_lengths_get_the_tokens_they_get_alone(model, sampling):
    together = run(model, PROMPTS, sampling, [3, 4, 5])
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(together[row], run(model, [prompt], sampling, [3 + row])[0])


@pytest.mark.slow  # the same of their tokens is above
def test_prompts_of_unequal_lengths_get_the_logits_they_get_alone(model):
    tokens, positions = left_padded(PROMPTS)
    context = Context(jnp.asarray(positions >= 0, jnp.int32), jnp.asarray(positions))
    hidden, _, _ = called(model, jnp.asarray(tokens), context, model.init_state(3, tokens.shape[1]))
    for row, prompt in enumerate(PROMPTS):
        alone, _, _ = called(model, jnp.asarray([prompt]), Context.whole(1, len(prompt)))
        np.testing.assert_allclose(hidden[row, -len(prompt) :], alone[0], rtol=1e-4, atol=1e-5)


def test_greedy_decoding_equals_running_the_whole_text_again_for_each_token(model):
    text = np.zeros((1, 12), np.int32)  # of one length, to compile once: what comes after a token changes nothing
    text[0, :6] = PROMPTS[0]
    for place, token in enumerate(run(model, PROMPTS[:1], Sampling(temperature=0), [0])[0], 6):
        hidden, _, _ = called(model, jnp.asarray(text), Context.whole(*text.shape))
        assert token == jnp.argmax(model.logits(hidden[0, place - 1])[:VOCAB])
        text[0, place] = token


def test_seeds_decide_the_draws(model):
    sampling = Sampling(2.0)
    first = run(model, [PROMPTS[0]] * 3, sampling, [1, 2, 1])
    np.testing.assert_array_equal(first[0], first[2])
    assert (first[0] != first[1]).any()


def test_filters_keep_the_likeliest_tokens_only():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.06, 0.04]))[None].repeat(2000, 0)
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = lambda sampling: np.unique(sample(logits, keys, sampling)).tolist()
    assert drawn(Sampling(1.0)) == [0, 1, 2, 3, 4]
    assert drawn(Sampling(1.0, top_k=2)) == [0, 1]
    assert drawn(Sampling(1.0, top_p=0.69)) == [0, 1]
    assert drawn(Sampling(1.0, top_p=0.71)) == [0, 1, 2]
    assert drawn(Sampling(1.0, top_k=3, top_p=0.05)) == [0]
    assert drawn(Sampling(0.0)) == [0]
    frequency = np.bincount(sample(logits, keys, Sampling(1.0)), minlength=5) / 2000
    np.testing.assert_allclose(frequency, [0.4, 0.3, 0.2, 0.06, 0.04], atol=0.04)


@pytest.mark.parametrize(
    'options, message', [({'temperature': -1}, 'temperature'), ({'top_k': -1}, 'top_k'), ({'top_p': 0}, 'top_p')]
)
def test_bad_sampling_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


@pytest.mark.parametrize('prompts', [[], [[]], [[VOCAB]], [[-1]]], ids=str)
def test_bad_prompts_are_refused(model, prompts):
    with pytest.raises(UserError, match='prompt'):
        next(generate(model, prompts, 1, Sampling(), [0] * len(prompts), VOCAB))


def test_weights_that_are_not_finite_draw_nothing(model):
    variables = nnx.split(model)
    broken = nnx.merge(variables[0], jax.tree.map(lambda x: x * jnp.nan, variables[1]))
    assert (run(broken, PROMPTS[:1], Sampling(2.0), [1]) == -1).all()
