"""Configuration: every option can be overridden, nothing unknown or ill-typed passes, messages say what is right."""

import json
import textwrap

import pytest

from mixcon_jax import config as configs
from mixcon_jax.config import ConfigError
from mixcon_jax.options import Option, leaves


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
    configs._check_leaf(key, option.default, option)
    assert option.meaning.endswith(('.', ')', '"')), option.meaning


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
        ('train.accum_steps=3', 'train.accum_steps=3 must divide train.batch_size=4'),
        ('data.weights=1,2', 'data.weights has 2 numbers for 1'),
        ('optim.warmup_steps=1000', 'exceeds train.steps'),
        ('mesh.tensor=2', 'not supported yet'),
        ('mesh.context=3', 'mesh.context=3 must divide data.seq_len='),
        ('mesh.fsdp=3', 'must divide'),
        ('mesh.data=4', 'takes 4 devices'),
        ('train.batch_size=3', 'must divide train.batch_size'),
    ],
)
def test_bad_values_are_refused_in_one_line(experiment, override, message):
    with pytest.raises(ConfigError) as error:
        configs.validate(configs.load(experiment, [override]), num_devices=2)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


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


def test_missing_experiment_file():
    with pytest.raises(ConfigError, match=r'nothing\.py does not exist'):
        configs.load('nothing.py')


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
