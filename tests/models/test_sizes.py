"""Published models have their published parameters, their experiment is a line, and what is said to fit does."""

import json

import pytest

from mixcon_jax import config as configs
from mixcon_jax.cli import main
from mixcon_jax.models.sizes import SIZES
from mixcon_jax.planner import plan as planner
from mixcon_jax.reports import presets
from tests.models.cases import traced_once
from tests.test_experiments import LADDER
from tests.tiny import ROOT

# H100s that each is planned for, of docs/models.md: 8, or for what is larger, a power of two.
DEVICES = dict.fromkeys(SIZES, 8) | {
    'conba': 16, 'rwkv4-14b': 16, 'mixtral-8x7b': 32, 'jamba-v0.1': 64, 'mixcon': 128, 'llama2-70b': 256,
}  # fmt: skip
EXACT = sorted(name for name, size in SIZES.items() if size.total)


@pytest.fixture(scope='module', autouse=True)
def counted_once():
    """Several tests ask for all figures."""
    count, known = presets.figures, {}

    def figures(size):
        if id(size) not in known:
            known[id(size)] = count(size)
        return known[id(size)]

    with traced_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, 'figures', figures)
        yield


@pytest.mark.parametrize('name', EXACT)
def test_parameters_are_the_published_ones(name):
    assert presets.figures(SIZES[name])['parameters'] == SIZES[name].total


@pytest.mark.parametrize('name', [name for name in SIZES if name.startswith('rwkv4')])
def test_rwkv4_has_what_its_paper_counts(name):
    """2 V D + 13 D^2 L + D (11 L + 4) of Peng et al."""
    model = SIZES[name].options
    width, layers, words = model['dim'], model['num_blocks'], model['vocab_size']
    published = 2 * words * width + 13 * width**2 * layers + width * (11 * layers + 4)
    assert presets.figures(SIZES[name])['parameters'] == published


@pytest.mark.parametrize('name', [name for name in SIZES if name.startswith('mamba2')])
def test_mamba2_has_what_its_released_layer_counts(name):
    model = SIZES[name].options
    width, states = model['dim'], 128
    inner, heads = 2 * width, 2 * width // 64
    mixed = inner + 2 * states
    layer = width * (inner + mixed + heads) + 5 * mixed + 3 * heads + inner + inner * width + width
    total = model['num_blocks'] * layer + model['vocab_size'] * width + width
    assert presets.figures(SIZES[name])['parameters'] == total


def test_all_are_listed_with_their_figures(capsys):
    with pytest.raises(SystemExit, match='0'):
        main(['presets', '--json'])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(SIZES)
    assert found['mixtral-8x7b']['active'] == 12_879_925_248
    assert found['llama2-70b']['cache_bytes_per_token'] == pytest.approx(327_680, rel=0.002)  # and the tokens' numbers
    assert found['mixcon']['cache_bytes_per_token'] == pytest.approx(8192, rel=0.005)
    assert found['jamba-v0.1']['state_bytes'] == pytest.approx(15.3 * 2**20, rel=0.01)
    assert found['mamba-130m']['cache_bytes_per_token'] == 0
    with pytest.raises(SystemExit, match='0'):
        main(['presets'])
    printed = capsys.readouterr().out
    assert all(f'\n{name} ' in printed for name in SIZES) and '51,570,323,328' in printed


@pytest.mark.parametrize('name', ['mamba-130m', 'mixtral-8x7b', 'rwkv4-169m', 'pangu-pi-1b'])
def test_an_experiment_is_a_line(name):
    config = configs.validate(configs.load(f'{ROOT}/experiments/presets.py:{name}'), DEVICES[name])
    assert config.name == name and config.model.dim == SIZES[name].options['dim']


@pytest.mark.slow
@pytest.mark.parametrize('name', SIZES)
def test_it_trains_on_as_many_gpus_as_is_said(name):
    """Compiled for H100s that are not there, a row of 4096 tokens a device and microbatch."""
    overrides = ['model.unroll=1', f'train.accum_steps={256 // DEVICES[name]}']
    found = planned(f'presets.py:{name}', DEVICES[name], overrides)
    assert found['fits']
    assert found['model']['total'] == presets.figures(SIZES[name])['parameters']


@pytest.mark.slow
@pytest.mark.parametrize('name, devices', LADDER.items())
def test_mixcons_files_fit_the_gpus_that_they_name(name, devices):
    """As they are: their microbatches, and what they keep for the backward pass."""
    assert planned(f'mixcon/{name}.py', devices, ['model.unroll=1'] * (name == 'paper'))['fits']  # minutes less


def planned(experiment, devices, overrides):
    config = configs.load(f'{ROOT}/experiments/{experiment}', overrides)
    hosts = max(1, devices // 8)
    job = {'target': 'h100', 'hosts': hosts, 'per_host': devices // hosts, 'what': 'train', 'batch': 1, 'context': 0}
    found = planner.plan(configs.validate(config, devices), job, ['cublas'], planner.read_limit('', 'h100'))
    print(f'{experiment}: {found["peak"] / 2**30:.1f} GiB of each of {devices}')
    return found


def test_an_unknown_name_is_told_the_known():
    with pytest.raises(Exception, match="unknown preset 'mamba-3b'; choose from mixcon, conba, mamba-130m"):
        configs.load(f'{ROOT}/experiments/presets.py:mamba-3b')
