"""Layers and whole models equal the published implementations of Hugging Face transformers: outputs and gradients.

The oracle is the fixtures, which make_fixtures.py computed with transformers' own modules; `make parity` computes them
anew.
"""

import jax
import numpy as np
import pytest

from mixcon_jax.interop import huggingface
from mixcon_jax.models import presets
from mixcon_jax.models.layers import Parameters, RMSNorm
from tests.parity import cases


def conba(preset: str) -> dict:
    return {f'conba.{name}': value for name, value in presets.conba(preset).items()}


# fixture, our layer, options of config.model
LAYERS = {
    'mamba': ('mamba_mixer', 'mamba', {}),
    'mamba, sequential scan': ('mamba_mixer', 'mamba', {'ssm.implementation': 'reference'}),
    'mamba, associative scan': ('mamba_mixer', 'mamba', {'ssm.implementation': 'associative'}),
    'mamba with norms': ('jamba_mamba_mixer', 'mamba', {'mamba.norms': True}),
    # Every mechanism of Conba starts as the identity, so at the start the presets are Jamba's mixer.
    'conba': ('jamba_mamba_mixer', 'conba', conba('conba')),
    'conba_paper': ('jamba_mamba_mixer', 'conba', conba('conba_paper')),
    'conba_code': ('jamba_mamba_mixer', 'conba', conba('conba_code')),
    'conba with diagonal gain': ('jamba_mamba_mixer', 'conba', {'conba.control': 'diag'}),
    'conba, all off': ('jamba_mamba_mixer', 'conba', {f'conba.{k}': v for k, v in presets.CONBA_OFF.items()}),
    'attention': ('jamba_attention', 'attention', {}),
    'attention in one tile': ('jamba_attention', 'attention', {'attention.block_size': 256}),
    'attention with RoPE': ('llama_attention', 'attention', {'attention.rope': True}),
    'moe dense': ('jamba_moe', 'moe', {'moe.implementation': 'dense'}),
    'moe grouped': ('jamba_moe', 'moe', {'moe.implementation': 'grouped', 'moe.group_block': 16}),
    'moe dense, renormalized': ('mixtral_moe', 'moe', {'moe.implementation': 'dense', 'moe.renormalize': True}),
    'moe grouped, renormalized': ('mixtral_moe', 'moe', {'moe.implementation': 'grouped', 'moe.renormalize': True}),
    'mlp': ('jamba_mlp', 'mlp', {}),
}

ROPE = {'attention.rope': True, 'norm_eps': 1e-5}
JAMBA = {
    'pattern': ('mamba+mlp', 'mamba+moe', 'attention+mlp', 'mamba+moe'),
    'mamba.norms': True,
    'ssm.chunk': 4,  # compiles faster
}
# fixture, blocks, options of config.model
MODELS = {
    'jamba': ('jamba_model', 1, JAMBA),
    'jamba with conba in place of mamba': (
        'jamba_model',
        1,
        JAMBA | {'pattern': ('conba+mlp', 'conba+moe', 'attention+mlp', 'conba+moe')},
    ),
    'jamba, recomputed': ('jamba_model', 1, JAMBA | {'remat': 'block'}),
    'llama': ('llama_model', 2, ROPE | {'pattern': ('attention+mlp',)}),
    'llama, unstacked': (
        'llama_model',
        1,
        {'pattern': ('attention+mlp',) * 2, 'attention.rope': True, 'norm_eps': 1e-5},
    ),
    'mixtral': (
        'mixtral_model',
        2,
        ROPE | {'pattern': ('attention+moe',), 'attention.rope_theta': 1e6, 'moe.renormalize': True},
    ),
}


def compare(gradients, expected, untouched):
    """Each expected gradient is ours; a parameter that transformers lacks is one of Conba's own."""
    for name, gradient in expected.items():
        cases.assert_same(gradients[name], gradient, f'the gradient of {name}')
    assert set(gradients) - set(expected) == untouched


# Scans and tiles of attention equal one another in tests/kernels_pallas, and every preset starts as the Mamba mixer in
# tests/models/test_conba.py: of each kind one is always compared.
ALIKE = ('mamba, sequential scan', 'mamba, associative scan', 'attention in one tile', 'moe dense, renormalized')
ALIKE += ('conba_paper', 'conba_code', 'conba with diagonal gain')


def but_slow(names, slow):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


@pytest.mark.parametrize('name', but_slow(LAYERS, ALIKE))
def test_layer(name):
    fixture, kind, options = LAYERS[name]
    theirs = cases.fixture(fixture)
    model, architecture = cases.model_config(options), cases.architecture(fixture)
    module = cases.layer(kind, model)
    ours = lambda prefix: huggingface.layer_weights(cases.below(theirs, prefix), kind, model, architecture)
    own = cases.load(module, ours('w'))
    assert not own or kind == 'conba'
    y, dx, gradients = cases.run_layer(module, theirs['x'], theirs['dy'])
    cases.assert_same(y, theirs['y'], 'the output')
    cases.assert_same(dx, theirs['dx'], 'the gradient of the input')
    compare(gradients, ours('dw'), own)


def test_rms_norm():
    theirs = cases.fixture('jamba_rms_norm')
    module = RMSNorm(32, Parameters(jax.random.key(0)), 1e-6)
    assert not cases.load(module, huggingface.norm_weights(cases.below(theirs, 'w')))
    y, pullback = jax.vjp(module, jax.numpy.asarray(theirs['x']))
    cases.assert_same(np.asarray(y), theirs['y'], 'the output')
    cases.assert_same(np.asarray(pullback(theirs['dy'])[0]), theirs['dx'], 'the gradient of the input')


SLOW = ('jamba with conba in place of mamba', 'jamba, recomputed', 'llama, unstacked')


@pytest.mark.parametrize('name', but_slow(MODELS, SLOW))
def test_model(name):
    fixture, num_blocks, options = MODELS[name]
    theirs = cases.fixture(fixture)
    config = cases.model_config(options, num_blocks=num_blocks)
    module = cases.model(config)
    ours = lambda prefix: huggingface.model_weights(cases.below(theirs, prefix), config, cases.architecture(fixture))
    own = cases.load(module, ours('w'))
    assert not own or 'conba' in name
    y, gradients = cases.run_model(module, theirs['tokens'], theirs['dy'])
    cases.assert_same(y, theirs['y'], 'the logits')
    compare(gradients, ours('dw'), own)
