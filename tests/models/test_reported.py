"""The names of what layers report: made and read back in one place, and none that could mean two things."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from mixcon_jax import config as configs
from mixcon_jax import parsing
from mixcon_jax.errors import ConfigError
from mixcon_jax.models import kinds, reported
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import create
from mixcon_jax.models.ffns.mlp import MLP
from mixcon_jax.models.layers import Buffer, Loss
from mixcon_jax.options import Statistic


def test_names_are_read_back_by_each_part():
    parts = {'mixer': {'load': 1, 'gain': 2}, 'ffn': {'load': 3, 'entropy': 4}}
    stats = reported.statistics(3, parts)
    assert stats == {'layer_3/load': 1, 'layer_3/gain': 2, 'layer_3/ffn_load': 3, 'layer_3/entropy': 4}
    stats |= reported.statistics(31, {'mixer': {}, 'ffn': {'load': 5}})
    assert stats['layer_31/load'] == 5
    found = reported.by_part(3, stats)
    assert found['mixer'] == {'load': 1, 'gain': 2, 'entropy': 4}
    assert found['ffn'] == {'load': 3, 'gain': 2, 'entropy': 4}
    assert reported.by_part(31, stats) == {'mixer': {'load': 5}, 'ffn': {'load': 5}}


def saying(**aux):
    """An FFN that reports this."""

    class Saying(MLP):
        def __call__(self, x, context, state):
            return *super().__call__(x, context, state)[:2], aux

    return Saying


def run(monkeypatch, kind):
    monkeypatch.setitem(kinds.FFNS, 'saying', kind)
    config = configs.default()
    config.model.update(dim=16, vocab_size=61, pattern=('attention+saying',))
    model = create(configs.validate(config).model)
    return jax.eval_shape(lambda ids: model(ids, Context.whole(1, 4))[2], jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize('name', sorted(reported.RECORDED))
def test_no_loss_of_a_layer_takes_the_place_of_what_training_records(name, monkeypatch):
    with pytest.raises(ConfigError, match=rf"Saying reports the loss '{name}', which training records itself; take an"):
        run(monkeypatch, saying(losses={name: Loss(jnp.float32(1))}))


def test_a_statistic_that_could_be_another_parts_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="Saying reports the statistic 'ffn_load', but ffn_ marks an FFN's where"):
        run(monkeypatch, saying(stats={'ffn_load': jnp.ones(2)}))
    aux = run(monkeypatch, saying(stats={'load': jnp.ones(2)}, losses={'own': Loss(jnp.float32(1))}))
    assert (list(aux['stats']), list(aux['losses'])) == (['layer_0/load'], ['own'])


def test_what_readers_take_for_objects_or_numbers_of_another_kind_is_no_name_for_a_loss():
    """Else a record of training with such a loss would be read as none."""
    assert {*parsing.MAPPINGS, *parsing.NUMBERS} <= reported.RECORDED


def test_a_part_is_shown_what_its_class_declares_and_nothing_of_the_other(monkeypatch):
    """Also where the other's name has no mark, because it alone reports it; what its bases declare is its own."""
    shown = {}

    def counting(name, *reports):
        class Base(MLP):
            STATISTICS: ClassVar = {reports[0]: Statistic('The first.')}

        class Counting(Base):
            STATISTICS: ClassVar = {other: Statistic('Another.') for other in reports[1:]}

            def __init__(self, config, params, num_layers):
                super().__init__(config, params, num_layers)
                self.count = Buffer(jnp.zeros((1,)), logical_axes=('experts',))

            def __call__(self, x, context, state):
                return *super().__call__(x, context, state)[:2], {'stats': dict.fromkeys(reports, jnp.ones(1))}

            def update_buffers(self, buffers, stats):
                shown[name] = set(stats)
                return buffers

        return Counting

    monkeypatch.setitem(kinds.MIXERS, 'one', counting('mixer', 'both', 'first'))
    monkeypatch.setitem(kinds.FFNS, 'other', counting('ffn', 'both', 'second'))
    config = configs.default()
    config.model.update(dim=16, vocab_size=61, num_blocks=1, pattern=('one+other',))
    model = create(configs.validate(config).model)
    stats = model(jnp.zeros((1, 4), jnp.int32), Context.whole(1, 4))[2]['stats']
    assert set(stats) == {'layer_0/both', 'layer_0/ffn_both', 'layer_0/first', 'layer_0/second'}
    zero = {'count': jnp.zeros((1, 1))}
    model.update_buffers({'blocks': {'layers': {'0': {'mixer': zero, 'ffn': zero}}}}, stats)
    assert shown == {'mixer': {'both', 'first'}, 'ffn': {'both', 'second'}}


def test_one_that_is_declared_is_refused_where_the_configuration_is_read(monkeypatch):
    kind = saying()
    kind.STATISTICS = {'ffn_load': Statistic('Load.')}
    monkeypatch.setitem(kinds.FFNS, 'saying', kind)
    with pytest.raises(ConfigError, match=r"Saying declares the statistic 'ffn_load', but ffn_ marks .* take another"):
        configs.default()
