"""Every mixer with every FFN, in models that mix them all: they train together, and each of their parameters learns."""

import collections
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax import step
from mixcon_jax.models import kinds
from mixcon_jax.models.pattern import parse_layer
from mixcon_jax.trees import named_leaves
from tests.models import cases
from tests.training import mesh_of, random_batch

MIXERS, FFNS = kinds.names('mixer'), ['', *kinds.names('ffn')]
STEPS, ROWS, LENGTH = 50, 4, 16


def square(shift):
    """A layer of each mixer, the i-th with FFN i + shift, every second in parallel; all shifts have every pair."""
    layers = []
    for i, mixer in enumerate(MIXERS):
        ffn = FFNS[(i + shift) % len(FFNS)]
        layers.append(mixer + ('+|'[i % 2] + ffn if ffn else ''))
    return tuple(layers)


@functools.cache
def batches():
    """Two that come again and again: packed documents of unequal lengths, with padding."""
    return tuple(random_batch(seed, ROWS, LENGTH) for seed in (0, 1))


def config_of(pattern):
    options = {}
    for layer in pattern:
        options |= cases.fitting(layer)
    config = configs.default()
    config.model.update(cases.model_config(options | {'pattern': pattern, 'num_blocks': 2}).to_dict())
    config.data.seq_len = LENGTH
    config.train.update(batch_size=ROWS, steps=STEPS)
    config.optim.update(learning_rate=0.01, warmup_steps=5, weight_decay=0.0)
    return configs.validate(config)


def trained(pattern):
    """The losses of 50 steps, and the parameters before and after, by name."""
    config = config_of(pattern)
    steps = step.make_steps(config, mesh_of(config))
    state = steps.init_state()
    first = {name: np.array(value) for name, value in named_leaves(state.params).items()}
    losses = []
    for batch in itertools.islice(itertools.cycle(map(steps.put, batches())), STEPS):
        state, metrics = steps.train_step(state, batch)
        losses.append(metrics['loss'])
    assert int(state.skipped) == 0
    return np.array(jax.device_get(losses)), first, named_leaves(state.params)


def by_token_alone():
    """The least mean loss, in nats, of who sees a token and nothing of what came before it."""
    counts = collections.Counter()
    for batch in batches():
        scored = batch['loss_mask']
        counts.update(zip(batch['tokens'][scored].tolist(), batch['targets'][scored].tolist(), strict=True))
    tokens = collections.Counter()
    for (token, _), count in counts.items():
        tokens[token] += count
    return sum(-n * math.log(n / tokens[token]) for (token, _), n in counts.items()) / sum(counts.values())


# With every FFN that there was when this was written; one of them is always run, as its layers are by themselves.
PATTERNS = {'first': square(0)[:3], 'next': square(0)[3:5]}
SQUARES = {f'square_{shift}': square(shift) for shift in range(len(FFNS))}


@pytest.mark.parametrize(
    'name', ['next', *(pytest.param(name, marks=pytest.mark.slow) for name in ('first', *SQUARES))]
)
def test_mixed_patterns_learn_with_all_their_parts(name):
    """The loss falls from quarter to quarter, below what no mixer is needed for, and every layer's arrays move.

    Without weight decay an array that no gradient reaches stays as it was, bit for bit.
    """
    losses, first, last = trained((PATTERNS | SQUARES)[name])
    assert losses[0] == pytest.approx(math.log(61), abs=0.1)
    quarters = [part.mean() for part in np.array_split(losses, 4)]
    assert quarters == sorted(quarters, reverse=True), quarters
    assert losses[-len(batches()) :].mean() < by_token_alone() / 2, (losses, by_token_alone())
    for parameter, value in first.items():
        moved = np.asarray(last[parameter]) != value
        blocks = moved if parameter.startswith('blocks/') else moved[None]
        assert all(block.any() for block in blocks), f'{parameter} does not learn'


def test_the_patterns_have_every_pair_of_kinds():
    layers = {parse_layer(layer)[:2] for pattern in SQUARES.values() for layer in pattern}
    assert layers == {(mixer, ffn) for mixer in kinds.names('mixer') for ffn in ('', *kinds.names('ffn'))}
