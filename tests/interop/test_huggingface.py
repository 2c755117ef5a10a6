"""Published weights under our names: what a layer says of them is whole, and what has no place is refused by name.

That the values are right, too, is for tests/parity to say.
"""

from typing import ClassVar

import jax
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
    layer = nnx.eval_shape(lambda: kind(model if extended is None else extended, Parameters(jax.random.key(0)), 1))
    ours = {'/'.join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    places = huggingface.published(name, architecture, role).weights.values()
    named = [mine for place in places for mine in place(np.zeros((2, 2, 2)))]
    assert len(named) == len(set(named))
    norms = {f'{part}_norm/scale' for part in ('dt', 'B', 'C')}
    assert set(named) == (ours - norms if architecture == 'mamba' else ours)


def test_a_layer_that_says_nothing_is_refused_by_name(monkeypatch):
    class Private(Mamba):
        PUBLISHED: ClassVar = {}

    monkeypatch.setitem(kinds.MIXERS, 'private', Private)
    with pytest.raises(UserError, match=r"^the layer 'private' does not say .* in jamba, nor in any other"):
        huggingface.layer_weights({'D': np.zeros(2)}, 'private', 'jamba')
    with pytest.raises(UserError, match=r"^the layer 'mamba' does not say .* in llama, only in mamba, jamba$"):
        huggingface.model_weights({}, model_config({'pattern': ('mamba+mlp',)}), 'llama')


def test_a_layer_of_ones_own_is_mapped_by_what_its_class_says(monkeypatch):
    class Mine(Mamba):
        PUBLISHED: ClassVar = {'llama': Published('mine', {'skip': same('D')})}

    monkeypatch.setitem(kinds.MIXERS, 'mine', Mine)
    theirs = {f'model.layers.{i}.mine.skip': np.full(2, i) for i in range(4)}
    theirs |= {f'model.layers.{i}.mlp.up_proj.weight': np.zeros((3, 2)) for i in (1, 3)}
    found = huggingface.model_weights(theirs, model_config({'pattern': ('mine', 'mine+mlp')}), 'llama')
    np.testing.assert_array_equal(found.pop('blocks/layers/0/mixer/D')[:, 0], [0, 2])
    np.testing.assert_array_equal(found.pop('blocks/layers/1/mixer/D')[:, 0], [1, 3])
    assert {name: value.shape for name, value in found.items()} == {'blocks/layers/1/ffn/w_up': (2, 2, 3)}


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
        huggingface.model_weights({name: np.zeros(2)}, model_config({'pattern': ('attention+mlp',)}), 'llama')


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match=r"^the architecture 'gpt2' is not known; choose from jamba, llama, mixtral$"):
        huggingface.model_weights({}, model_config(), 'gpt2')
