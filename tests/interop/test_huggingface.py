"""Published weights under our names: what a layer says of them is whole, and what has no place is refused by name.

That the values are right, too, is for tests/parity to say.
"""

import re
from typing import ClassVar

import numpy as np
import pytest
from flax import nnx

from mixcon_jax.errors import UserError
from mixcon_jax.interop import huggingface
from mixcon_jax.models import kinds
from mixcon_jax.models.layers import Parameters
from mixcon_jax.models.mixers.mamba import Mamba
from mixcon_jax.models.published import Published, same
from tests.models.cases import model_config

MODEL = model_config({'pattern': ('attention+mlp',), 'num_blocks': 3, 'tie_embeddings': False})
PUBLISHED = [
    (name, role, of)
    for role in kinds.REGISTRIES
    for name in kinds.names(role)
    for of in kinds.load(name, role).PUBLISHED
]


@pytest.mark.parametrize('name, role, architecture', PUBLISHED)
def test_every_parameter_of_a_layer_has_a_published_name_or_is_its_own_addition(name, role, architecture):
    """And no published weight goes where the layer has no parameter, for Mamba with norms as Jamba has them."""
    model = model_config({'mamba.norms': architecture == 'jamba'})
    kind = kinds.load(name, role)
    extended = kind.without_additions(model)
    layer = nnx.eval_shape(lambda: kind(model if extended is None else extended, Parameters(None), 1))
    ours = {'/'.join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    places = huggingface.published(name, architecture, role).weights.values()
    named = [mine for place in places for mine in place.ours(np.zeros((2, 2, 2)), model)]
    assert len(named) == len(set(named))
    norms = {f'{part}_norm/scale' for part in ('dt', 'B', 'C')}
    assert set(named) == (ours - norms if architecture in ('mamba', 'falcon_mamba') else ours)


def test_a_layer_that_says_nothing_is_refused_by_name(monkeypatch):
    class Private(Mamba):
        PUBLISHED: ClassVar = {}

    monkeypatch.setitem(kinds.MIXERS, 'private', Private)
    with pytest.raises(UserError, match=r"^the layer 'private' does not say .* in jamba, nor in any other"):
        huggingface.layer_weights({'D': np.zeros(2)}, 'private', MODEL, 'jamba')
    with pytest.raises(
        UserError, match=r"^the layer 'mamba' does not say .* llama, only in mamba, falcon_mamba, jamba$"
    ):
        huggingface.model_weights({}, model_config({'pattern': ('mamba+mlp',)}), 'llama')


def test_a_layer_of_ones_own_is_mapped_by_what_its_class_says(monkeypatch):
    class Mine(Mamba):
        PUBLISHED: ClassVar = {'llama': Published('mine', {'skip': same('D')})}

    monkeypatch.setitem(kinds.MIXERS, 'mine', Mine)
    model = model_config({'pattern': ('mine', 'mine+mlp'), 'num_blocks': 2, 'tie_embeddings': False})
    theirs = llama(4) | {f'model.layers.{i}.mine.skip': np.full(2, i) for i in range(4)}
    theirs = {name: value for name, value in theirs.items() if not re.search(r'self_attn|[02]\.(mlp|post)', name)}
    found = huggingface.model_weights(theirs, model, 'llama')
    for j in (0, 1):
        np.testing.assert_array_equal(found[f'blocks/layers/{j}/mixer/D'][:, 0], [j, j + 2])
        np.testing.assert_array_equal(found[f'blocks/layers/{j}/mixer_norm/scale'][:, 0], [j, j + 2])
    assert found['blocks/layers/1/ffn/w_up'].shape == (2, 2, 3) and found['embedding'].shape == (5, 2)
    assert not [name for name in found if '/0/ffn' in name]


def llama(layers: int) -> dict[str, np.ndarray]:
    """The names of a Llama's weights, of hardly any size; norms hold their layer's number."""
    theirs = {'model.embed_tokens.weight': np.zeros((5, 2)), 'lm_head.weight': np.zeros((5, 2))}
    theirs['model.norm.weight'] = np.zeros(2)
    for i in range(layers):
        layer = f'model.layers.{i}'
        theirs |= {f'{layer}.{norm}_layernorm.weight': np.full(2, i) for norm in ('input', 'post_attention')}
        theirs |= {f'{layer}.self_attn.{part}_proj.weight': np.zeros((2, 2)) for part in 'qkvo'}
        theirs |= {f'{layer}.mlp.{part}_proj.weight': np.zeros((3, 2)) for part in ('gate', 'up', 'down')}
    return theirs


@pytest.mark.parametrize(
    'lost, message',
    [
        (r'\.1\.', r'^input_layernorm of layer 1 \(attention\+mlp\) from llama lacks weight$'),
        (r'\.2\.mlp', r'^mlp of layer 2 .* lacks gate_proj\.weight, up_proj\.weight, down_proj\.weight$'),
        (r'\.0\..*[kv]_proj', r'^self_attn of layer 0 .* from llama lacks k_proj\.weight, v_proj\.weight$'),
        (r'\.1\.post', r'^post_attention_layernorm of layer 1 .* lacks weight$'),
        (r'model\.norm', r'^a model from llama lacks model\.norm\.weight$'),
        (r'lm_head', r'^a model from llama lacks lm_head\.weight$'),
    ],
)
def test_a_place_without_a_weight_is_refused_by_name(lost, message):
    """Else a stack is one layer short, and what comes behind the gap stands in another block's place."""
    theirs = llama(3)
    assert huggingface.model_weights(theirs, MODEL, 'llama')['blocks/layers/0/mixer_norm/scale'].shape == (3, 2)
    with pytest.raises(UserError, match=message):
        huggingface.model_weights({k: v for k, v in theirs.items() if not re.search(lost, k)}, MODEL, 'llama')


def test_a_layer_beyond_the_models_is_refused_by_number():
    with pytest.raises(UserError, match=r'^there is a layer 6 from llama, but the model has 3 layers, 0 to 2: m'):
        huggingface.model_weights(llama(7), MODEL, 'llama')


@pytest.mark.parametrize('text', ['attention', 'attention|mlp'])
def test_only_norms_that_the_layer_has_have_a_place(text):
    """A mixer alone has its own, and a mixer and an FFN in parallel share one."""
    theirs, model = llama(1), model_config({'pattern': (text,), 'num_blocks': 1, 'tie_embeddings': False})
    theirs = {name: value for name, value in theirs.items() if 'mlp' not in name or 'mlp' in text}
    with pytest.raises(UserError, match=r'has no place for post_attention_layernorm, only for input_layernorm, '):
        huggingface.model_weights(theirs, model, 'llama')
    found = huggingface.model_weights({k: v for k, v in theirs.items() if '.post_' not in k}, model, 'llama')
    assert not [name for name in found if 'ffn_norm' in name]


def test_a_model_whose_head_is_its_embedding_has_no_place_for_another():
    theirs = llama(1)
    model = model_config({'pattern': ('attention+mlp',), 'num_blocks': 1, 'tie_embeddings': True})
    with pytest.raises(UserError, match=r'^a model from llama has no place for the weight lm_head\.weight'):
        huggingface.model_weights(theirs, model, 'llama')
    del theirs['lm_head.weight']
    assert 'output' not in huggingface.model_weights(theirs, model, 'llama')


@pytest.mark.parametrize(
    'name, message',
    [
        ('model.layers.1.mlp.bias', r'^mlp of layer 1 \(attention\+mlp\) from llama has no place for the weight bias,'),
        ('model.layers.0.mamba.D', r'^layer 0 \(attention\+mlp\) from llama has no place for mamba, only for input_l'),
        ('model.rotary', r'^a model from llama has no place for the weight model\.rotary, only for model\.embed'),
    ],
)
def test_a_weight_without_a_place_is_refused_by_name(name, message):
    with pytest.raises(UserError, match=message):
        huggingface.model_weights(llama(3) | {name: np.zeros(2)}, MODEL, 'llama')


@pytest.mark.parametrize('lost', ['gate_proj', 'w1'])
def test_an_expert_without_one_of_its_matrices_is_refused(lost):
    theirs = {f'a.experts.{i}.{part}.weight': np.full((3, 2), i) for i in (0, 1) for part in ('gate_proj', 'up_proj')}
    theirs |= {f'a.experts.{i}.down_proj.weight': np.full((2, 3), i) for i in (0, 1)}
    found = huggingface.of_modules(theirs)
    assert {name: value.shape for name, value in found.items()} == {
        'a.experts.gate_up_proj': (2, 6, 2), 'a.experts.down_proj': (2, 2, 3),
    }  # fmt: skip
    del theirs['a.experts.1.gate_proj.weight']
    theirs |= {} if lost == 'gate_proj' else {'a.experts.2.w1.weight': np.zeros((3, 2))}
    with pytest.raises(
        UserError, match=r'^a\.experts has [23] experts, each with gate_proj, up_proj, down_proj, but for '
    ):
        huggingface.of_modules(theirs)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match=r"^the architecture 'gpt2' is not known; choose from bamba, falcon_mamba, ja"):
        huggingface.model_weights({}, model_config(), 'gpt2')


def test_names_of_older_files():
    """Llama's had what positions rotate by among their weights, Mamba's another name of the embedding."""
    ours = huggingface.of_modules({
        'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(2),
        'backbone.embedding.weight': np.ones(3),
        'backbone.embeddings.scale': np.ones(4),
    })  # fmt: skip
    assert {name: len(value) for name, value in ours.items()} == {
        'backbone.embeddings.weight': 3,
        'backbone.embeddings.scale': 4,
    }
