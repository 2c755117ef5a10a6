"""What a kind of layer says of itself: read from its source it is what its class has; JAX stays unloaded."""

import dataclasses
import inspect
import os
import subprocess
import sys
import textwrap
import types
import uuid

import pytest

from mixcon_jax import config as configs
from mixcon_jax.errors import ConfigError
from mixcon_jax.models import declared, kinds
from mixcon_jax.models.layer import Layer
from tests.models import cases
from tests.tiny import ROOT

REGISTERED = [(name, role) for role in kinds.REGISTRIES for name in kinds.names(role)]


def plain(value):
    """A description with its functions as what they compute, so that two readings of one source compare equal."""
    if isinstance(value, types.FunctionType):
        value = inspect.unwrap(value)  # the tests' checks of annotations
        return plain(value.__code__), plain(dict(inspect.getclosurevars(value).nonlocals))
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, tuple(map(plain, value.co_consts))
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize('name, role', REGISTERED)
def test_the_description_from_the_source_is_that_of_the_class(name, role, monkeypatch):
    from_source = kinds.describe(name, role)
    kind = kinds.load(name, role)
    assert issubclass(kind, Layer)
    monkeypatch.setitem(kinds.REGISTRIES[role], name, kind)
    of_class = kinds.describe(name, role)
    assert from_source is not of_class and plain(of_class) == plain(from_source)
    assert from_source.declarations[0].owner == declared.CONTRACT


def test_a_mixers_options_are_its_bases_and_its_own():
    assert list(kinds.describe('conba').options) == ['ssm', 'conba']
    assert list(kinds.groups()) == [
        'attention', 'ssm', 'mamba', 'conba', 'mamba2', 'retnet', 'gla', 'rwkv4', 'rwkv6', 'rwkv7', 'moe', 'moe_mamba',
        'large_kernel', 'hyena', 'hyena_modal', 'mlp', 'rwkv_channel_mix', 'series_mlp',
    ]  # fmt: skip


LOADED = """
    import sys
    from mixcon_jax import config
    config.validate(config.default())
    print(config.validate(config.load('experiments/quickstart.py')).model.moe.hidden_dim)
    print(sorted({'jax', 'jaxlib', 'flax', 'numpy', 'kernels_pallas'} & set(sys.modules)))
"""


def test_reading_and_checking_a_configuration_loads_neither_jax_nor_kernels():
    run = [sys.executable, '-c', textwrap.dedent(LOADED)]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    assert subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True).stdout == '176\n[]\n'


# ----- files of one's own -----
FILE = """
import math
import jax
from flax import nnx
from mixcon_jax.checks import divides
from mixcon_jax.models.layer import Layer
from mixcon_jax.options import POSITIVE, Option

WIDTH = 16
FLOOR = jax.numpy.float32(1)


class Base(Layer):
    OPTIONS = {'base': {'width': Option(0, 'Width.', derive=lambda model: math.ceil(model.dim / WIDTH))}}


class Mine(Base):
    OPTIONS: dict = {'mine': {'lag': Option(1, 'Lag.', POSITIVE)}}
    OTHER = FLOOR

    @staticmethod
    def check(model: nnx.Module) -> None:
        divides('model.mine.lag', model.mine.lag, 'model.dim', model.dim)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Registers class Mine of a file with that content, as a mixer 'mine'; the file is never run."""
    monkeypatch.syspath_prepend(tmp_path)

    def register(content: str = FILE) -> str:
        path = tmp_path / f'mine_{uuid.uuid4().hex}.py'  # what was read of a module is kept
        path.write_text(content)
        monkeypatch.setitem(kinds.MIXERS, 'mine', f'{path.stem}.Mine')
        return path.stem

    return register


def test_a_mixer_of_ones_own_brings_its_options_their_derivation_and_its_checks(write):
    module = write()
    config = configs.default()
    assert (config.model.mine.lag, config.model.base.width) == (1, 0)
    config.model.pattern = ('mine+mlp',)
    assert configs.validate(config).model.base.width == 8
    config.model.mine.lag = 5
    with pytest.raises(ConfigError, match=r'^model\.mine\.lag=5 must divide model\.dim=128$'):
        configs.validate(config)
    config.model.mine.lag = 0
    with pytest.raises(ConfigError, match=r'^model\.mine\.lag=0 must be at least 1$'):
        configs.validate(config)
    config.model.pattern, config.model.mine.lag = ('mamba',), 5
    configs.validate(config)  # a layer that no pattern has is not checked
    assert module not in sys.modules


def test_a_mixer_of_ones_own_is_in_the_shared_suite_at_a_size_that_its_checks_allow(write):
    write(FILE.replace('Option(1,', 'Option(256,'))
    found = cases.of_every_kind()
    assert found.keys() == set(kinds.names())
    assert found['mine'] == ('mine', {'pattern': ('mine',), 'mine.lag': cases.DIM})
    write(FILE.replace('Option(1,', 'Option(-1,'))
    with pytest.raises(ConfigError, match=r'^model\.mine\.lag=-1 must be at least 1$'):
        cases.of_every_kind()


@pytest.mark.parametrize(
    'old, new, message',
    [
        ('/ WIDTH', '/ FLOOR', r"(Mine|Base) needs 'FLOOR', but is read without its file"),
        ('@staticmethod', '@classmethod', r'line 22: check\(\) of a layer must be a @staticmethod'),
        ('class Mine(Base)', 'class Mine(nnx.Module)', r'the base class nnx.Module of a layer cannot be followed'),
        ('class Base(Layer)', 'class Base', r'does not derive from mixcon_jax\.models\.layer\.Layer'),
        ('class Mine', 'class Other', r'defines no class Mine'),
        ("{'mine'", "{'ssm'", r"declares options 'ssm', which .*(Mine|SelectiveSSM) has"),
        ("{'mine'", "{'dim'", r"declares options 'dim', which the model has"),
    ],
)
def test_a_description_that_cannot_be_read_is_refused_in_one_line(write, old, new, message):
    assert old in FILE
    write(FILE.replace(old, new))
    with pytest.raises(ConfigError, match=message) as error:
        configs.default()
    assert '\n' not in str(error.value)


def test_a_class_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setitem(kinds.MIXERS, 'mine', 'nothing.such.Mine')
    with pytest.raises(ConfigError, match=r'nothing\.such\.Mine is registered, but No module named'):
        configs.default()
    monkeypatch.setitem(kinds.MIXERS, 'mine', 'mixcon_jax.models.mixers.nothing.Mine')
    with pytest.raises(ConfigError, match=r'there is no module mixcon_jax\.models\.mixers\.nothing'):
        configs.default()


def test_a_name_in_both_registries_means_one_class(monkeypatch):
    """A group of model.layers names a kind without its role, so its options could be of either."""
    monkeypatch.setitem(kinds.MIXERS, 'moe', kinds.FFNS['moe'])
    assert kinds.names().count('moe') == 1
    config = configs.default()
    config.model.update(pattern=('big+big',), layers={'big': {'kind': 'moe', 'num_experts': 6}})
    assert configs.validate(config).model.layers.big.num_experts == 6
    monkeypatch.setitem(kinds.FFNS, 'mamba', kinds.FFNS['mlp'])
    with pytest.raises(
        ConfigError,
        match=r"^'mamba' is registered as mixer .*\.Mamba and as ffn .*\.MLP; give one of them another name$",
    ):
        configs.default()
    assert kinds.describe('mamba', 'ffn').options.keys() == {'mlp'}


def test_a_layer_must_say_its_operations():
    class Silent(Layer):
        def __init__(self, config, params, num_layers):
            pass

        def __call__(self, x, context, state):
            return x, state, {}

    with pytest.raises(TypeError, match='flops'):
        Silent(None, None, 1)
