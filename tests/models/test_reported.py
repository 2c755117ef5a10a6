"""The names of what layers report: made and read back in one place, and none that could mean two things."""

import jax
import jax.numpy as jnp
import pytest

from mixcon_jax import config as configs
from mixcon_jax.errors import ConfigError
from mixcon_jax.models import kinds, reported
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import create
from mixcon_jax.models.ffns.mlp import MLP
from mixcon_jax.models.layers import Loss
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
    with pytest.raises(ValueError, match=rf"Saying reports the loss '{name}', which training records itself; take an"):
        run(monkeypatch, saying(losses={name: Loss(jnp.float32(1))}))


def test_a_statistic_that_could_be_another_parts_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="Saying reports the statistic 'ffn_load', but ffn_ marks an FFN's where"):
        run(monkeypatch, saying(stats={'ffn_load': jnp.ones(2)}))
    aux = run(monkeypatch, saying(stats={'load': jnp.ones(2)}, losses={'own': Loss(jnp.float32(1))}))
    assert (list(aux['stats']), list(aux['losses'])) == (['layer_0/load'], ['own'])


def test_one_that_is_declared_is_refused_where_the_configuration_is_read(monkeypatch):
    kind = saying()
    kind.STATISTICS = {'ffn_load': Statistic('Load.')}
    monkeypatch.setitem(kinds.FFNS, 'saying', kind)
    with pytest.raises(ConfigError, match=r"Saying declares the statistic 'ffn_load', but ffn_ marks .* take another"):
        configs.default()
