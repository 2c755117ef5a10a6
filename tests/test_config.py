"""Configuration: every option can be overridden, nothing unknown or ill-typed passes, messages say what is right."""

import dataclasses
import fnmatch
import json
import os
import re
import textwrap

import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax.checks import check_leaf
from mixcon_jax.config import ConfigError, leaves
from mixcon_jax.options import INT32, SMALLEST, UINT32, Option, beyond, float32
from tests.tiny import ROOT


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / 'experiment.py'
    path.write_text(
        textwrap.dedent("""
        from mixcon_jax.config import default

        def get_config(arg=None):
            config = default()
            config.name = arg or 'none'
            return config
        """)
    )
    return str(path)


def another(key: str, option: Option):
    """A valid value other than the default."""
    value = option.default
    if isinstance(value, bool):
        return not value
    if option.check and option.check.words.startswith('one of '):
        choices = option.check.words.removeprefix('one of ').split(', ')
        return next(choice for choice in choices if choice != value and choice)
    if key == 'data.sources':
        return 'stdlib', 'stdlib'  # only before a source does a comma end one
    if key == 'train.xla_flags':
        return ('xla_gpu_autotune_level=0',)
    if isinstance(value, tuple):
        return {int: (2, 3), float: (0.5, 0.25), str: ('conba', 'mamba')}[option.element]
    if isinstance(value, str):
        return 'another'
    candidates = [value + 1, value * 2, value / 2 if isinstance(value, float) else value - 1, 1, 64]
    return next(type(value)(c) for c in candidates if c != value and (not option.check or option.check.holds(c)))


@pytest.mark.parametrize('key, option', list(leaves()), ids=[key for key, _ in leaves()])
def test_every_option_can_be_overridden_on_the_command_line(experiment, key, option):
    value = another(key, option)
    text = ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
    config = configs.load(experiment, [f'{key}={text}'])
    assert configs.get(config, key) == value
    assert type(configs.get(config, key)) is type(option.default)
    others = {k: v for k, v in configs.flatten(config).items() if k not in (key, 'name')}
    assert others == {k: v for k, v in configs.flatten(configs.default()).items() if k not in (key, 'name')}


@pytest.mark.parametrize('key, option', list(leaves()), ids=[key for key, _ in leaves()])
def test_every_default_passes_its_own_check_and_has_a_meaning(key, option):
    check_leaf(key, option.default, option)
    assert option.meaning.endswith(('.', ')', '"')), option.meaning


@pytest.mark.parametrize('text, elements', [
    ('xla_a=1', ('xla_a=1',)),
    ('xla_a=1/xla_b=x', ('xla_a=1', 'xla_b=x')),
    ("'xla_a=X,Y/xla_b=Z'", ('xla_a=X,Y', 'xla_b=Z')),
])  # fmt: skip
def test_flags_of_xla_have_slashes_between_and_may_hold_commas(experiment, text, elements):
    assert configs.load(experiment, [f'train.xla_flags={text}']).train.xla_flags == elements


@pytest.mark.parametrize('text, elements', [
    ('files:/a, b/*.txt,files:c/*.txt', ('files:/a, b/*.txt', 'files:c/*.txt')),
    ('files:/q,a:b/*.txt', ('files:/q,a:b/*.txt',)),
    ('files:a/*.txt, store:b,stdlib', ('files:a/*.txt', 'store:b', 'stdlib')),
    ('files:a,stdlib/*.txt', ('files:a,stdlib/*.txt',)),
])  # fmt: skip
def test_a_comma_ends_a_source_only_before_another(experiment, text, elements, tmp_path):
    for written in (text, f"'{text}'", repr(elements)):
        assert configs.load(experiment, [f'data.sources={written}']).data.sources == elements
    # In a file one text that names several is split as well, as experiments do that pass their argument on.
    path = tmp_path / 'file.py'
    path.write_text(
        'from mixcon_jax.config import default\n\ndef get_config():\n    config = default()\n'
        f'    config.data.sources = ({text!r},)\n    return config\n'
    )
    config = configs.load(str(path), ['train.steps=70'])
    assert config.data.sources == configs.validate(config).data.sources == elements
    assert configs.from_json(configs.to_json(config)).data.sources == elements


def test_argument_reaches_get_config(experiment):
    assert configs.load(f'{experiment}:hello').name == 'hello'


@pytest.mark.parametrize(
    'override, message',
    [
        ('modle.dim=3', 'did you mean model.dim'),
        ('train.step=3', 'did you mean train.steps'),
        ('dim=3', 'did you mean model.dim'),
        ('model=3', 'group of options'),
        ('train.steps', 'has no value'),
        ('train.steps=many', 'train.steps'),
        ('train.steps=1.5', 'train.steps'),
        ('model.dim=0', 'model.dim=0 must be at least 1'),
        ('optim.betas=0.9', 'optim.betas'),
        ('optim.betas=0.9,0.95,0.99', 'optim.betas'),
        ('optim.betas=a,b', 'optim.betas'),
        ('model.conba.taps=1,1', 'distinct'),
        ('optim.name=adm', 'one of adamw'),
        ('model.pattern=conba+mlp,atention+mlp', "unknown mixer 'atention'; did you mean 'attention'"),
        ('model.pattern=conba+mop', "unknown ffn 'mop'"),
        ('model.attention.num_heads=3', 'model.attention.num_kv_heads=2 must divide'),
        ('model.dim=130', 'must divide'),
        ('model.conba.head_dim=48', 'model.conba.head_dim=48 must divide'),
        ('model.moe.top_k=9', 'exceeds model.moe.num_experts'),
        (('model.conba.control=slow', 'model.conba.kappa=bounded'), "set model.conba.kappa='free'"),
        (('model.pattern=moe_mamba', 'model.moe.shared_experts=1'), 'no meaning for moe_mamba'),
        ('train.accum_steps=3', 'train.accum_steps=3 must divide train.batch_size=4'),
        ('data.weights=1,2', 'data.weights has 2 numbers for 1'),
        ('optim.warmup_steps=1000', 'exceeds train.steps'),
        ('mesh.tensor=0', 'mesh.tensor=0 must be -1 or at least 1'),
        ('mesh.rules=embd=fsdp', "unknown logical axis 'embd'; did you mean 'embed'"),
        ('mesh.rules=embed=fdsp', "unknown mesh axis 'fdsp'; did you mean 'fsdp'"),
        ('mesh.rules=embed=fsdp+fsdp', 'names an axis twice'),
        ('mesh.rules=heads=fsdp', 'fsdp cannot split heads; choose from tensor'),
        ('mesh.rules=heads=', 'heads and kv_heads belong together'),
        ('mesh.rules=batch=data', 'batch is shared out as it is loaded'),
        ('mesh.rules=embed', 'has no "="'),
        ('mesh.context=3', 'mesh.context=3 must divide data.seq_len='),
        ('mesh.fsdp=3', 'must divide'),
        ('mesh.data=4', 'takes 4 devices'),
        ('train.batch_size=3', 'must divide train.batch_size'),
    ],
)
def test_bad_values_are_refused_in_one_line(experiment, override, message):
    with pytest.raises(ConfigError) as error:
        configs.validate(configs.load(experiment, [override] if type(override) is str else override), num_devices=2)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'overrides, message',
    [
        (['mesh.tensor=4'], 'mesh.tensor=4 must divide model.attention.num_kv_heads=2'),
        (['mesh.data=1', 'mesh.tensor=-1'], 'mesh.tensor=8 must divide model.attention.num_heads=4'),
        (['mesh.tensor=2', 'model.conba.head_dim=256'], 'must divide the inner width / model.conba.head_dim=1'),
        (['mesh.tensor=2', 'model.mlp.hidden_dim=33'], 'mesh.tensor=2 must divide model.mlp.hidden_dim=33'),
        (['mesh.tensor=2', 'model.moe.hidden_dim=33'], 'mesh.tensor=2 must divide model.moe.hidden_dim=33'),
        (['mesh.expert=8', 'train.batch_size=8'], 'mesh.expert=8 must divide model.moe.num_experts=4'),
        (['mesh.fsdp=4', 'mesh.tensor=2', 'mesh.rules=heads=/kv_heads=', 'model.attention.num_heads=1',
          'model.attention.num_kv_heads=1'], ''),
        (['mesh.expert=8', 'model.pattern=attention+mlp', 'train.batch_size=8'], ''),
    ],
)  # fmt: skip
def test_a_mesh_over_which_a_layer_does_not_split_is_refused(experiment, overrides, message):
    config = configs.load(experiment, overrides)
    if not message:
        configs.validate(config, num_devices=8)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        configs.validate(config, num_devices=8)


def test_unknown_key_in_the_experiment_file_is_refused():
    config = configs.default()
    config.model.heads = 3
    with pytest.raises(ConfigError, match=r'unknown option model\.heads'):
        configs.validate(config)


@pytest.mark.parametrize(
    'content, message',
    [
        ('def get_config(): 1/0', 'ZeroDivisionError'),
        ('x = 1', '.py has no get_config(arg=None)'),
        ('def get_config():\n    import nothing.such', '.py, line 2: ModuleNotFoundError'),
        ('from mixcon_jax import config\ndef get_config():\n    config.default().seed = "x"', '.py, line 3: TypeError'),
        ('def get_config(): return {}', 'must return a ConfigDict'),
        ('def get_config(:', 'SyntaxError'),
    ],
)
def test_a_broken_experiment_file_is_named(tmp_path, content, message):
    path = tmp_path / 'broken.py'
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        configs.load(str(path))
    assert message in str(error.value)
    assert 'broken.py' in str(error.value)


def test_an_experiment_file_in_the_home_folder(experiment, monkeypatch, tmp_path):
    """As in --config=~/experiment.py, where no shell replaces the ~."""
    monkeypatch.setenv('HOME', str(tmp_path))
    assert configs.load('~/experiment.py:hello').name == 'hello'


def test_of_an_option_that_is_given_twice_the_last_counts(experiment):
    overrides = ['model.pattern=mamba', 'train.steps=70', 'train.steps=80', 'model.pattern=conba+mlp,mamba']
    config = configs.load(experiment, overrides)
    assert config.model.pattern == ('conba+mlp', 'mamba') and config.train.steps == 80


def test_an_experiment_file_that_may_not_be_read(experiment, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(ConfigError, match=r'experiment\.py cannot be read: permission denied'):
        configs.load(experiment)


def test_missing_experiment_file():
    with pytest.raises(ConfigError, match=r'nothing\.py does not exist'):
        configs.load('nothing.py')


@pytest.mark.parametrize('argument', ['', ':hello'])
def test_a_path_with_a_colon_is_refused_by_its_reason(tmp_path, argument):
    (tmp_path / 'a:b').mkdir()
    (tmp_path / 'a:b' / 'file.py').write_text('')
    with pytest.raises(ConfigError, match='its path must not hold a colon'):
        configs.load(f'{tmp_path}/a:b/file.py{argument}')


def test_json_round_trip_and_differences():
    config = configs.resolve(configs.default())
    assert configs.from_json(configs.to_json(config)).to_dict() == config.to_dict()
    assert json.loads(configs.to_json(config))['model']['dim'] == config.model.dim
    other = configs.from_json(configs.to_json(config))
    other.train.steps += 1
    assert configs.differences(config, other) == {'train.steps': (config.train.steps, config.train.steps + 1)}


def test_resolve_spells_out_derived_sizes():
    config = configs.resolve(configs.default())
    assert config.model.attention.head_dim == 32
    assert config.model.ssm.dt_rank == 8
    assert config.model.mlp.hidden_dim == 352
    assert config.model.moe.hidden_dim == 176


# ---------------------------------------------------------------------------------------------------------------------
# 32 bits
# ---------------------------------------------------------------------------------------------------------------------
def of_kind(kind: type):
    """Options whose value, or whose elements, are of this type, as test parameters."""
    kinds = {key: option.element or type(option.default) for key, option in leaves()}
    return pytest.mark.parametrize('key', [key for key in kinds if kinds[key] is kind])


@of_kind(int)
def test_integers_that_32_bits_cut_are_refused_and_the_key_named(key):
    most, option = UINT32 if key == 'seed' else INT32, dict(leaves())[key]
    for value in (most + 1, most + 6, 2**63, 10**400, -(2**31) - 1):
        with pytest.raises(ConfigError, match=rf'^{key}=.*at most {most}$'):
            check_leaf(key, (1, value) if option.element else value, option)
    unchecked = dataclasses.replace(option, check=None)  # most of them would be far too many
    check_leaf(key, (1, most) if option.element else most, unchecked)


@of_kind(float)
def test_floats_that_float32_makes_infinite_or_zero_are_refused_and_the_key_named(key):
    option = dict(leaves())[key]
    for value in (1e39, -1e39, 1e-39, -1e-39, 5e-324, float('inf'), float('nan')):
        with pytest.raises(ConfigError, match=rf'^{key}=.*(float32|finite)'):
            check_leaf(key, (0.5, value) if option.element else value, option)


def test_integers_that_no_float_holds_are_infinite():
    values = {'optim': {'eps': 10**400, 'betas': [0.5, -(10**400)]}}
    config = configs.from_dict(values)
    assert config.optim.eps == np.inf and config.optim.betas == (0.5, -np.inf)
    with pytest.raises(ConfigError, match=r'^optim\.betas=-inf must be finite'):
        configs.validate(config)


@pytest.mark.parametrize(
    'key, value',
    [('optim.betas', (0.9, 1 - 1e-9)), ('data.heldout_fraction', 1 - 1e-9), ('data.heldout_fraction', 1e-39)],
)
def test_what_is_right_in_64_bits_must_be_right_in_float32(key, value):
    config = configs.default()
    configs.put(config, key, value)
    with pytest.raises(ConfigError, match=rf'^{key}=.*float32'):
        configs.validate(config)


def test_seeds_that_only_their_sum_cuts_are_refused():
    """The noise of Conba is drawn with the sum."""
    config = configs.default()
    config.seed, config.train.seed_noise = UINT32 - 5, 5
    configs.validate(config)
    config.train.seed_noise = 6
    with pytest.raises(ConfigError, match=r'^seed \+ train\.seed_noise=4294967296 .* at most 4294967295'):
        configs.validate(config)


def test_float32_is_numpys_but_for_what_xla_takes_for_zero():
    rng = np.random.default_rng()
    numbers = rng.standard_normal(2000) * 10.0 ** rng.integers(-60, 60, 2000)
    edges = [0.0, -0.0, SMALLEST, SMALLEST / 2, -SMALLEST / 2, 3.4028235e38, 3.4028236e38, -1e39, np.inf]
    for number in (*numbers, *edges):
        with np.errstate(over='ignore', under='ignore'):
            expected = float(np.float32(number))
        expected = expected if abs(expected) >= SMALLEST else 0.0
        assert float32(float(number)) == expected, number
        assert bool(beyond(float(number))) == (not np.isfinite(expected) or (expected == 0) != (number == 0)), number


@pytest.mark.parametrize('content', [b'', b'{', b'[1]', b'{"name": "caf\xe9"}', b'[' * 100_000, b'{"nmae": 1}'])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / 'config.json'
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        configs.read(path)
    assert 'nmae' in str(error.value) or str(path) in str(error.value)


@pytest.mark.parametrize('text, message', [('caf\udce9', r"name=b'caf\\xe9' is not UTF-8"), ('a\0', 'NUL')])
def test_text_that_libraries_cannot_take_is_refused(text, message):
    config = configs.default()
    config.name = text
    with pytest.raises(ConfigError, match=message):
        configs.validate(config)


def test_the_docs_name_all_that_may_change_between_starts():
    page = (ROOT / 'docs' / 'howto-resume.md').read_text()
    patterns = re.findall('`([a-z_.*]+)`', page)
    assert [key for key in configs.free({}) if not any(fnmatch.fnmatch(key, pattern) for pattern in patterns)] == []


def test_what_may_change_may_change_in_named_layers_too():
    config = configs.default()
    config.model.layers = {'local': {'kind': 'attention', 'window': 8}, 'many': {'kind': 'moe'}}
    named = {key for key in configs.free(config) if key.startswith('model.layers.')}
    assert named == {
        f'model.layers.{key}'
        for key in ('local.block_size', 'many.exchange', 'many.group_block', 'many.implementation')
    }
    assert configs.free(config) - named == configs.free({})
