"""Patterns that name a group of options: a part with options of its own, wherever a configuration goes."""

import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.sweep import cases
from mixcon_jax import config as configs
from mixcon_jax.errors import ConfigError
from mixcon_jax.models import kinds, pattern, presets
from mixcon_jax.models.accounting import exponentials_per_token, flops_per_token, parameter_count, state_bytes
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import create
from mixcon_jax.models.layers import Loss

MODEL = {'dim': 32, 'vocab_size': 61, 'num_blocks': 2, 'pattern': ('attention+mlp', 'local+big', 'conba')}
LAYERS = {
    'local': {'kind': 'attention', 'rope': True, 'num_kv_heads': 4, 'rope_theta': 500},
    'big': {'kind': 'moe', 'num_experts': 6, 'top_k': 3},
}


def named(layers=LAYERS, **model):
    config = configs.default()
    config.model.update(MODEL | model)
    config.model.conba.head_dim = 16
    config.model.layers = layers
    return config


def test_a_named_part_reads_the_models_options_with_its_own():
    model = configs.validate(named()).model
    first, second, third = (pattern.parts(model, text) for text in model.pattern)
    assert first['mixer'].model is model and not model.attention.rope
    local, big = second['mixer'], second['ffn']
    assert (local.kind, big.kind, list(third)) == ('attention', 'moe', ['mixer'])
    assert local.model.attention.to_dict() == model.attention.to_dict() | {
        'rope': True, 'num_kv_heads': 4, 'rope_theta': 500.0,
    }  # fmt: skip
    assert type(local.model.attention.rope_theta) is float
    assert big.model.moe.num_experts == 6 and model.moe.num_experts == 4


def test_what_follows_from_a_named_parts_options_is_spelled_out_once():
    """An expert's width follows from top_k: 3 of the named experts share what 2 of the others do."""
    config = configs.validate(named())
    assert config.model.moe.hidden_dim == config.model.mlp.hidden_dim // 2
    assert config.model.layers.big.hidden_dim == config.model.mlp.hidden_dim // 3
    assert 'head_dim' not in config.model.layers.local
    assert configs.validate(config) == config
    config = named()
    config.model.moe.hidden_dim = 24  # given, it holds for both
    assert 'hidden_dim' not in configs.validate(config).model.layers.big


def test_the_configuration_comes_back_from_json_and_older_ones_name_nothing():
    config = configs.validate(named())
    text = configs.to_json(config)
    assert json.loads(text)['model']['layers']['local']['rope_theta'] == 500.0
    assert configs.from_json(text).to_dict() == config.to_dict()
    assert configs.flatten(config)['model.layers.local.rope'] is True
    other = configs.from_json(text)
    other.model.layers.local.rope = False
    assert configs.differences(config, other) == {'model.layers.local.rope': (True, False)}
    assert configs.differences(config, configs.validate(named(pattern=('mamba',), layers={})))
    plain = configs.validate(configs.default())
    assert 'layers' not in json.loads(configs.to_json(plain))['model']
    assert configs.from_json(configs.to_json(plain)).to_dict() == plain.to_dict()


@pytest.mark.parametrize(
    'layers, message',
    [
        ({'local': {'kind': 'atention'}}, "model.layers.local.kind='atention' is no mixer or ffn; did you mean 'at"),
        ({'local': {'rope': True}}, 'model.layers.local has no kind; write model.layers.local = dict(kind='),
        ({'local': 3}, 'model.layers.local has no kind'),
        ({'mamba': {'kind': 'attention'}}, 'model.layers.mamba has the name of a kind of layer'),
        ({'a+b': {'kind': 'attention'}}, "'a+b' cannot stand in a pattern"),
        ({'local': {'kind': 'attention', 'ropes': True}}, 'unknown option model.layers.local.ropes; did you mean'),
        ({'local': {'kind': 'attention', 'd_state': 8}}, 'unknown option model.layers.local.d_state; did you mean'),
        ({'local': {'kind': 'attention', 'rope': 1}}, 'model.layers.local.rope=1 is a int; it must be a bool'),
        ({'local': {'kind': 'attention', 'num_heads': 0}}, 'model.layers.local.num_heads=0 must be at least 1'),
        ({'local': {'kind': 'attention', 'num_heads': 2**40}}, 'is more than 32 bits hold'),
        ({'local': {'kind': 'attention', 'rope_theta': 1e39}}, 'is infinite in float32'),
        ({'local': {'kind': 'attention', 'num_heads': 3}}, 'model.layers.local: model.attention.num_kv_heads=2 must'),
        ({'local': {'kind': 'conba', 'taps': (1, 1)}}, 'model.layers.local.taps=(1, 1) must be distinct delays'),
        ({'local': {'kind': 'moe'}}, "has 'local' for its mixer, but model.layers.local is no mixer"),
        ({}, "unknown mixer 'local'"),
        (3, 'model.layers holds groups of options by name'),
    ],
)  # fmt: skip
def test_groups_that_cannot_be_are_refused_in_one_line(layers, message):
    config = named({}, pattern=('local+mlp',))
    configs.put(config, 'model.layers', layers)
    with pytest.raises(ConfigError) as error:
        configs.validate(config)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_counting_refuses_what_validation_would():
    """A sweep() counts parameters of a configuration that nothing has checked yet."""
    for layers, message in (
        ({'kind': 'attention', 'ropes': True}, 'unknown option model.layers.local.ropes'),
        ({}, "''"),
    ):
        with pytest.raises(ConfigError, match=message):
            parameter_count(named({'local': layers}, pattern=('local+mlp',)).model)


def test_a_group_that_no_pattern_uses_passes():
    configs.validate(named(pattern=('mamba+mlp',)))


# ----- experiment files -----
FILE = """
    from mixcon_jax.config import default

    def get_config(arg=None):
        config = default()
        config.model.pattern = ('local+mlp', 'attention+mlp')
        config.model.layers.local = dict(kind='attention', rope=False, num_heads=2)
        return config

    def sweep(arg=None):
        for rope in (False, True):
            yield {'model.layers.local.rope': rope}
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / 'experiment.py'
    path.write_text(textwrap.dedent(FILE))
    return str(path)


def test_the_command_line_overrides_what_the_file_sets(experiment):
    config = configs.load(experiment, ['model.layers.local.rope=True', 'model.dim=64'])
    assert config.model.layers.local.rope is True and config.model.dim == 64
    for override in ('model.layers.local.head_dim=8', 'model.layers.other.rope=True', 'model.layers.local=3'):
        with pytest.raises(
            ConfigError, match=r'the experiment file does not set it; it sets model\.layers\.local\.kind,'
        ):
            configs.load(experiment, [override])
    with pytest.raises(ConfigError, match=r'model\.layers holds groups of options by name'):
        configs.load(experiment, ['model.layers=3'])


def test_a_sweep_goes_over_options_of_a_named_part(experiment):
    found = cases.cases(experiment)
    assert [case.config.model.layers.local.rope for case in found] == [False, True]
    assert len({case.folder for case in found}) == 2


# ----- models -----
def test_parameters_operations_and_state_are_counted_with_a_parts_own_options():
    model = configs.validate(named()).model
    whole = configs.validate(named({}, pattern=('attention+mlp', 'attention+moe', 'conba'))).model
    heads = 2 * 2 * 32 * (4 - 2) * 8  # two blocks, k and v of two more heads of width 8
    width, wider = whole.moe.hidden_dim, model.layers.big.hidden_dim
    counts, others = parameter_count(model), parameter_count(whole)
    assert counts.total - others.total == heads + 2 * (32 * (6 - 4) + 3 * 32 * (6 * wider - 4 * width))
    assert counts.active - others.active == heads + 2 * (32 * (6 - 4) + 3 * 32 * (3 * wider - 2 * width))
    assert counts.added == others.added > 0
    assert flops_per_token(model, 64) - flops_per_token(whole, 64) == 3 * 2 * (counts.active - others.active)
    assert state_bytes(model, 64) - state_bytes(whole, 64) == 2 * 64 * 2 * (4 - 2) * 8 * 4


@pytest.mark.slow
def test_decoding_a_model_with_named_parts_equals_its_forward_pass():
    model = create(configs.validate(named(num_blocks=1, pattern=('local+big', 'attention'))).model, 0)
    ids = jax.random.randint(jax.random.key(0), (2, 7), 0, 61)
    expected, _, _ = model(ids, Context.whole(2, 7))
    state, outputs = model.init_state(2, 7), []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        hidden, state, _ = model(ids[:, start:stop], Context.whole(2, stop - start, start), state)
        outputs.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=2e-4, atol=2e-5)


def test_losses_of_parts_with_weights_of_their_own_add_up():
    layers = {'big': {'kind': 'moe', 'balance_coef': 0.3}, 'idle': {'kind': 'moe', 'balance': 'none'}}
    config = configs.validate(named(layers, num_blocks=1, pattern=('attention+moe', 'attention+big', 'mamba+idle')))
    model = create(config.model, 0)
    ids = jax.random.randint(jax.random.key(0), (2, 7), 0, 61)
    loss = model(ids, Context.whole(2, 7))[2]['losses']['balance']
    x, context = model.embedding[...][ids], Context.whole(2, 7)
    block = jax.tree.map(lambda value: value[0], model.blocks)
    found = []
    for layer in block.layers:
        x, _, auxes = layer(x, context, None)
        found.append(auxes['ffn']['losses']['balance'])
    assert [each.weight for each in found] == [0.01, 0.3, 0.0]
    np.testing.assert_allclose(loss.weight * loss.value, sum(e.weight * e.value for e in found) / 3, rtol=1e-5)


@pytest.mark.parametrize('weights', [(0.5, 0.5), (0.0, 0.0), (0.1, 0.4)])
def test_the_mean_of_losses_keeps_the_weighted_sum(weights):
    losses = [Loss(jnp.float32(value), weight) for value, weight in zip((1.0, 3.0), weights)]
    mean = Loss.mean(losses)
    np.testing.assert_allclose(mean.weight * mean.value, sum(e.weight * e.value for e in losses) / 2, rtol=1e-6)
    assert weights[0] != weights[1] or (mean.value == 2.0 and mean.weight == weights[0])


# ----- the class counts, not the name -----
def test_a_mixer_under_another_name_has_the_same_operations_and_parameters(monkeypatch):
    monkeypatch.setitem(kinds.MIXERS, 's6', kinds.MIXERS['mamba'])
    models = [configs.validate(named({}, pattern=(f'{name}+mlp',))).model for name in ('mamba', 's6')]
    assert flops_per_token(models[0], 64) == flops_per_token(models[1], 64)
    assert parameter_count(models[0]) == parameter_count(models[1])


def test_experts_as_a_mixer_are_active_in_part(monkeypatch):
    """And beside experts as the FFN: both losses enter the mean, and each moves its own bias by its own load."""
    monkeypatch.setitem(kinds.MIXERS, 'experts', kinds.FFNS['moe'])
    model = configs.validate(named({}, num_blocks=1, pattern=('experts',))).model
    counts, width = parameter_count(model), model.moe.hidden_dim
    assert counts.total - counts.active == (4 - 2) * 3 * 32 * width
    config = configs.validate(named({}, num_blocks=1, pattern=('experts+moe',)))
    config.model.moe.balance = 'bias'
    both = create(config.model, 0)
    aux = both(jnp.arange(8).reshape(1, 8), Context.whole(1, 8))[2]
    zero = {'router_bias': jnp.zeros((1, 4))}
    new = both.update_buffers({'blocks': {'layers': {'0': {'mixer': zero, 'ffn': zero}}}}, aux['stats'])
    for role, name in (('mixer', 'moe_load'), ('ffn', 'ffn_moe_load')):
        want = 1e-3 * np.sign(0.25 - np.asarray(aux['stats'][f'layer_0/{name}']))
        np.testing.assert_allclose(new['blocks']['layers']['0'][role]['router_bias'], want, rtol=1e-6)
    assert aux['losses']['balance'].weight == 0.0


def test_exponentials_are_what_layers_say():
    """Of a scan a state's, twice more backward; of attention a score's in either pass; and the softmax of the loss."""
    config = configs.default()
    config.model.update(dim=32, vocab_size=64, num_blocks=3, pattern=('mamba+mlp', 'attention', 'conba+mlp'))
    config.model.conba.update(presets.conba('conba_paper'))
    model = configs.validate(config).model
    states, scores = 2 * 32 * model.ssm.d_state, model.attention.num_heads * 128 / 2
    scans = 1 + 1 + model.conba.feedback_iters
    assert exponentials_per_token(model, 128) == (
        64 + 3 * (scans * states + scores),
        64 + 3 * (2 * scans * states + scores),
    )
