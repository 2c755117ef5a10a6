"""Mamba-2 and RWKV-4 equal transformers' at every length: outputs, gradients, logits, and token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.interop import huggingface
from mixcon_jax.models.context import Context
from tests.parity import cases, family

LENGTHS = (1, 3, 17, 64, 129)
MAMBA2 = {'mamba2.d_state': 8, 'mamba2.head_dim': 16, 'mamba2.chunk': 16}
INNER = 64


def rwkv(kind):
    return lambda weights: huggingface.layer_weights(weights, kind, 'rwkv')


# fixture -> our layer, options of config.model, what makes our weights of theirs
LAYERS = {
    'mamba2_mixer': ('mamba2', MAMBA2, lambda weights: family.mamba2(weights, INNER, 8)),
    'mamba2_groups_mixer': ('mamba2', MAMBA2 | {'mamba2.groups': 2}, lambda w: family.mamba2(w, INNER, 16)),
    'rwkv_attention': ('rwkv4', {}, rwkv('rwkv4')),
    'rwkv_feed_forward': ('rwkv_channel_mix', {'rwkv_channel_mix.hidden_dim': 48}, rwkv('rwkv_channel_mix')),
}
# Two groups have all that one has.
ONCE = [pytest.param(name, marks=[pytest.mark.slow] if name == 'mamba2_mixer' else []) for name in LAYERS]


def loaded(fixture):
    """The fixture, our layer with its weights, and what makes our weights of theirs."""
    kind, options, ours = LAYERS[fixture]
    theirs = cases.fixture(fixture)
    module = cases.layer(kind, cases.model_config(options))
    assert not cases.load(module, ours(cases.below(theirs, 'w')))
    return theirs, module, ours


@pytest.mark.parametrize('fixture', ONCE)
def test_outputs_and_gradients(fixture):
    theirs, module, ours = loaded(fixture)
    y, dx, gradients = cases.run_layer(module, theirs['x'], theirs['dy'])
    cases.assert_same(y, theirs['y'], 'the output')
    cases.assert_same(dx, theirs['dx'], 'the gradient of the input')
    expected = ours(cases.below(theirs, 'dw'))
    assert set(expected) == set(gradients)
    for name, gradient in expected.items():
        cases.assert_same(gradients[name], gradient, f'the gradient of {name}')


@pytest.mark.parametrize('fixture', ONCE)
def test_every_length_and_token_by_token(fixture):
    """The mixers are causal, so that what transformers gives for 129 tokens it gives for fewer."""
    theirs, module, _ = loaded(fixture)
    graphdef, variables = nnx.split(module)
    run = jax.jit(lambda x, context, state: nnx.merge(graphdef, variables)(x, context, state)[:2])
    x = jnp.asarray(theirs['x'])
    for length in LENGTHS:
        y, _ = run(x[:, :length], Context.whole(1, length), None)
        cases.assert_same(np.asarray(y), theirs['y'][:, :length], f'the output of {length} tokens')
    state, steps = module.init_state(1, x.shape[1]), []
    for t in range(x.shape[1]):
        y, state = run(x[:, t : t + 1], Context.whole(1, 1, jnp.int32(t)), state)
        steps.append(y)
    cases.assert_same(np.concatenate(steps, 1), theirs['y'], 'the output, token by token')


def test_a_whole_mamba2():
    """Logits and the gradient of every weight of two layers with two groups."""
    theirs = cases.fixture('mamba2_model')
    options = MAMBA2 | {'mamba2.groups': 2, 'pattern': ('mamba2',)}
    module = cases.model(cases.model_config(options, num_blocks=2))
    ours = lambda prefix: family.mamba2_model(cases.below(theirs, prefix), 2, INNER, 16)
    assert not cases.load(module, ours('w'))
    y, gradients = cases.run_model(module, theirs['tokens'], theirs['dy'])
    cases.assert_same(y, theirs['y'], 'the logits')
    for name, gradient in ours('dw').items():
        cases.assert_same(gradients[name], gradient, f'the gradient of {name}')
