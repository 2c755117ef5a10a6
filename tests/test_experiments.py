"""Every experiment file loads, validates and says what it is."""

import ast
import functools
import re
from pathlib import Path

import pytest

from launch.sweep import cases
from mixcon_jax import config as configs
from mixcon_jax.models import accounting, kinds
from tests.models.cases import traced_once

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / 'experiments').rglob('*.py') if path.name != '__init__.py')
# Files of experiments/mixcon, and the H100s that each is for by its docstring.
LADDER = {'130m': 1, '350m': 8, '1_3b': 8, '5b': 32, 'paper': 128}


@pytest.fixture(scope='module', autouse=True)
def counted_once():
    """Sweeps and their arms share models."""
    with traced_once():
        yield


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiment_is_valid_and_documented(path):
    config = configs.validate(configs.load(str(path)))
    assert config.name
    said = ast.get_docstring(ast.parse(path.read_text())) or ''
    name = str(path.relative_to(ROOT))
    assert len(said.splitlines()[0]) > 40, f'{name}: the docstring is to begin with what it is'
    assert re.search(r'\b(seconds?|minutes?|hours?|days)\b|GPU', said), f'{name}: the docstring is to say what it costs'
    run = rf'(mixcon (train|config)|launch\.sweep) --config {re.escape(name)}|make quickstart'
    assert re.search(run, said), f'{name}: the docstring is to say how to run it'


def test_the_quickstart_is_a_whole_mixcon():
    model = configs.validate(configs.load(str(ROOT / 'experiments' / 'quickstart.py'))).model
    assert accounting.parameter_count(model).total >= 1_200_000
    layers = ' '.join(model.pattern)
    assert all(part in layers for part in ('conba', 'attention', 'moe'))


@pytest.mark.parametrize('preset', ['conba', 'conba_paper', 'conba_code'])
def test_the_papers_model_takes_a_preset(preset):
    config = configs.load(f'{ROOT}/experiments/mixcon/paper.py:{preset}')
    assert config.model.conba.state_scaling == ('output' if preset == 'conba' else 'readout')


@functools.cache
def load_cases(path):
    return cases.cases(path)


# The slow ones try many widths for many arms; others of the same folder are checked alike.
DEAR = (
    'ablations/family.py', 'ablations/attention_conba_ratio.py', 'ablations/conba_parts.py', 'synthetic/family.py',
)  # fmt: skip
SWEEPS = [
    pytest.param(path, marks=[pytest.mark.slow] if path.as_posix().endswith(DEAR) else [])
    for path in FILES
    if 'def sweep(' in path.read_text()
]


@pytest.mark.parametrize('path', SWEEPS, ids=lambda path: path.stem)
def test_every_case_of_a_sweep_is_valid_and_every_seed_has_the_same_arms(path):
    found = load_cases(str(path))
    arms: dict[int, list[str]] = {}
    for case in found:
        arms.setdefault(case.config.seed, []).append(case.name)
    assert len({tuple(names) for names in arms.values()}) == 1, arms
    assert len(arms) >= 3 or path.parent == ROOT / 'experiments' / 'tutorial', (
        f'{path}: fewer than 3 seeds give no interval'
    )


@pytest.mark.parametrize('argument', ['', ':long'])
def test_the_arms_of_the_ratio_have_equal_parameters_and_tokens(argument):
    found = load_cases(f'{ROOT}/experiments/ablations/attention_conba_ratio.py{argument}')
    counts = {case.name: accounting.parameter_count(case.config.model).total for case in found if not case.config.seed}
    assert max(counts.values()) / min(counts.values()) < 1.02, counts
    tokens = {case.config.train.steps * case.config.train.batch_size * case.config.data.seq_len for case in found}
    assert len(tokens) == 1 and min(tokens) >= (4_000_000 if argument else 700_000)


@pytest.mark.slow  # committed files, which seldom change
def test_the_arms_of_conba_parts_and_the_baselines_have_nanos_parameters():
    folder = ROOT / 'experiments'
    nano = accounting.parameter_count(configs.load(f'{folder}/mixcon/nano.py').model).total
    for case in load_cases(f'{folder}/ablations/conba_parts.py')[:7]:
        assert abs(accounting.parameter_count(case.config.model).total / nano - 1) < 0.02, case.name
    for path in (folder / 'baselines').glob('*.py'):
        counts = accounting.parameter_count(configs.load(str(path)).model)
        assert abs(counts.active / nano - 1) < 0.02, path


@pytest.mark.slow
def test_the_arms_of_the_family_have_equal_parameters():
    cases = load_cases(f'{ROOT}/experiments/ablations/family.py')[:14]
    counts = {case.name: accounting.parameter_count(case.config.model).total for case in cases}
    assert max(counts.values()) / min(counts.values()) < 1.01, counts
    mixers = {layer.partition('+')[0] for case in cases for layer in case.config.model.pattern}
    kinds_left_out = {'moe_mamba'}  # experts, which have no equal of as many parameters
    assert mixers >= set(kinds.names('mixer')) - kinds_left_out


def test_the_synthetic_tasks_have_every_mixer_at_equal_parameters():
    folder = f'{ROOT}/experiments/synthetic'
    cases = load_cases(f'{folder}/family.py')[:11] + load_cases(f'{folder}/mqar.py')[:5]
    counts = {case.name: accounting.parameter_count(case.config.model).total for case in cases}
    assert max(counts.values()) / min(counts.values()) < 1.01, counts
    mixers = {layer.partition('+')[0] for case in cases for layer in case.config.model.pattern}
    assert mixers == set(kinds.names('mixer')) - {'moe_mamba'}


def test_the_arms_of_moe_have_equal_active_parameters():
    cases = load_cases(f'{ROOT}/experiments/ablations/moe.py')[:4]
    active = [accounting.parameter_count(case.config.model).active for case in cases]
    assert max(active) / min(active) < 1.005


def test_the_arms_of_moe_mamba_have_equal_active_parameters_and_those_of_8_experts_equal_totals():
    cases = load_cases(f'{ROOT}/experiments/ablations/moe_mamba.py')[:9]
    counts = {case.name: accounting.parameter_count(case.config.model) for case in cases}
    model = {case.name: case.config.model for case in cases}
    for name, count in counts.items():
        routers = sum('moe' in layer for layer in model[name].pattern) * model[name].dim * model[name].moe.num_experts
        assert abs((count.active - routers) / counts['Mamba'].active - 1) < 0.01, name
        assert count.active / counts['Mamba'].active < 1.03, name
    totals = [count.total for name, count in counts.items() if name.startswith(('8 experts', 'inside'))]
    assert len(totals) == 5 and max(totals) / min(totals) < 1.01


@pytest.mark.parametrize('name, rows', [('130m', 32), ('350m', 32), ('1_3b', 8), ('5b', 4), ('paper', 1)])
def test_the_ladders_microbatches_are_what_its_docstrings_say(name, rows):
    devices = LADDER[name]
    config = configs.validate(configs.load(f'{ROOT}/experiments/mixcon/{name}.py'), devices)
    at_once = devices * rows
    assert config.train.batch_size == at_once * config.train.accum_steps
    assert config.eval.batch_size == at_once


@pytest.mark.parametrize(
    'name, total', [('130m', 130e6), ('350m', 350e6), ('1_3b', 1.3e9), ('5b', 5e9)], ids=lambda value: str(value)
)
def test_the_ladder_has_the_sizes_of_its_names(name, total):
    model = configs.load(f'{ROOT}/experiments/mixcon/{name}.py').model
    assert abs(accounting.parameter_count(model).total / total - 1) < 0.02
