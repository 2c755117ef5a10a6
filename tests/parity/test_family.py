"""The recurrences and their hybrids equal transformers' at every length: outputs, gradients, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.interop import huggingface
from mixcon_jax.models.context import Context
from tests.parity import cases

LENGTHS = (1, 3, 17, 64, 129)
OF_WEIGHTS = 17  # the shorter length whose fixtures have the weights' gradients, too
MAMBA2 = {'mamba2.d_state': 8, 'mamba2.head_dim': 16, 'mamba2.chunk': 16}
GROUPS = MAMBA2 | {'mamba2.groups': 2}
FALCON_MAMBA = {'mamba.norms': True, 'mamba.norm_scales': False, 'mamba.norm_eps': 1e-3, 'ssm.chunk': 16}
RWKV = {'norm': 'layer', 'norm_eps': 1e-5, 'embedding_norm': True, 'rwkv_channel_mix.hidden_dim': 48}
HALF_ROTATED = {'attention.rope': True, 'attention.rope_dim': 4}

# fixture -> our layer, options of config.model
LAYERS = {
    'mamba2_mixer': ('mamba2', MAMBA2),
    'mamba2_groups_mixer': ('mamba2', GROUPS),
    'falcon_mamba_mixer': ('mamba', FALCON_MAMBA),
    'bamba_mixer': ('mamba2', GROUPS),
    'bamba_attention': ('attention', HALF_ROTATED),
    'rwkv_attention': ('rwkv4', {}),
    'rwkv_feed_forward': ('rwkv_channel_mix', RWKV),
}
# fixture -> blocks, options of config.model
MODELS = {
    'mamba2_model': (2, GROUPS | {'pattern': ('mamba2',)}),
    'falcon_mamba_model': (2, FALCON_MAMBA | {'pattern': ('mamba',), 'norm_eps': 1e-5}),
    'rwkv_model': (2, RWKV | {'pattern': ('rwkv4+rwkv_channel_mix',)}),
    'bamba_model': (1, GROUPS | HALF_ROTATED | {'pattern': ('mamba2+mlp', 'attention+mlp')}),
}
SLOW = [pytest.mark.slow]
# Two groups have all that one has, and Bamba's mixer is Mamba-2's.
ONCE = [pytest.param(name, marks=SLOW if name in ('mamba2_mixer', 'bamba_mixer') else []) for name in LAYERS]


def loaded_layer(fixture):
    """The fixture, our layer with its weights, and what makes our weights of theirs."""
    kind, options = LAYERS[fixture]
    theirs, model = cases.fixture(fixture), cases.model_config(options)
    module = cases.layer(kind, model)
    ours = lambda prefix: huggingface.layer_weights(
        cases.below(theirs, prefix), kind, model, cases.architecture(fixture)
    )
    assert not cases.load(module, ours('w'))
    return theirs, module, ours


def loaded_model(fixture):
    num_blocks, options = MODELS[fixture]
    theirs, model = cases.fixture(fixture), cases.model_config(options, num_blocks=num_blocks)
    module = cases.model(model)
    ours = lambda prefix: huggingface.model_weights(cases.below(theirs, prefix), model, cases.architecture(fixture))
    assert not cases.load(module, ours('w'))
    return theirs, module, ours


def compare(found, expected):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        cases.assert_same(found[name], gradient, f'the gradient of {name}')


def steps_of(run, x, state):
    """What `run` makes of one token after another."""
    found = []
    for t in range(x.shape[1]):
        y, state = run(x[:, t : t + 1], Context.whole(1, 1, jnp.int32(t)), state)
        found.append(y)
    return np.concatenate(found, 1)


@pytest.mark.parametrize('fixture', ONCE)
def test_outputs_and_gradients(fixture):
    theirs, module, ours = loaded_layer(fixture)
    y, dx, gradients = cases.run_layer(module, theirs['x'], theirs['dy'])
    cases.assert_same(y, theirs['y'], 'the output')
    cases.assert_same(dx, theirs['dx'], 'the gradient of the input')
    compare(gradients, ours('dw'))


@pytest.mark.slow
@pytest.mark.parametrize('fixture', LAYERS)
def test_gradients_of_every_length(fixture):
    theirs, module, ours = loaded_layer(fixture)
    for length in LENGTHS[:-1]:
        _, dx, gradients = cases.run_layer(module, theirs['x'][:, :length], theirs['dy'][:, :length])
        cases.assert_same(dx, theirs[f'dx@{length}'], f'the gradient of the input of {length} tokens')
        if length == OF_WEIGHTS:
            compare(gradients, ours(f'dw@{length}'))


@pytest.mark.parametrize('fixture', ONCE)
def test_every_length_and_token_by_token(fixture):
    """The mixers are causal, so that what transformers gives for 129 tokens it gives for fewer."""
    theirs, module, _ = loaded_layer(fixture)
    graphdef, variables = nnx.split(module)
    run = jax.jit(lambda x, context, state: nnx.merge(graphdef, variables)(x, context, state)[:2])
    x = jnp.asarray(theirs['x'])
    for length in LENGTHS:
        y, _ = run(x[:, :length], Context.whole(1, length), None)
        cases.assert_same(np.asarray(y), theirs['y'][:, :length], f'the output of {length} tokens')
    y = steps_of(run, x, module.init_state(1, x.shape[1]))
    cases.assert_same(y, theirs['y'], 'the output, token by token')


@pytest.mark.parametrize(
    'fixture',
    [pytest.param(name, marks=SLOW if name in ('falcon_mamba_model', 'bamba_model') else []) for name in MODELS],
)
def test_logits_and_gradients_of_a_whole_model(fixture):
    theirs, module, ours = loaded_model(fixture)
    y, gradients = cases.run_model(module, theirs['tokens'], theirs['dy'])
    cases.assert_same(y, theirs['y'], 'the logits')
    compare(gradients, ours('dw'))


def logits_of(module):
    graphdef, variables = nnx.split(module)

    @jax.jit
    def run(tokens, context, state):
        model = nnx.merge(graphdef, variables)
        hidden, state, _ = model(tokens, context, state)
        return model.logits(hidden), state

    return run


@pytest.mark.parametrize('fixture', MODELS)
def test_a_whole_model_token_by_token(fixture):
    theirs, module, _ = loaded_model(fixture)
    tokens = jnp.asarray(theirs['tokens'])
    y = steps_of(logits_of(module), tokens, module.init_state(1, tokens.shape[1]))
    cases.assert_same(y, theirs['y'], 'the logits, token by token')


@pytest.mark.slow
@pytest.mark.parametrize('fixture', MODELS)
def test_a_whole_model_of_every_length_and_after_a_prompt(fixture):
    theirs, module, _ = loaded_model(fixture)
    run, tokens = logits_of(module), jnp.asarray(theirs['tokens'])
    for length in LENGTHS:
        prompt, context, expected = tokens[:, :length], Context.whole(1, length), theirs['y'][:, : length + 1]
        y, _ = run(prompt, context, None)
        cases.assert_same(np.asarray(y), expected[:, :length], f'the logits of {length} tokens')
        if length < tokens.shape[1]:
            _, state = run(prompt, context, module.init_state(1, tokens.shape[1]))
            y, _ = run(tokens[:, length : length + 1], Context.whole(1, 1, jnp.int32(length)), state)
            cases.assert_same(np.asarray(y), expected[:, length:], f'the logits after a prompt of {length} tokens')
