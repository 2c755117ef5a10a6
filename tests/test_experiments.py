"""Every experiment file loads, validates and says what it is."""

import ast
from pathlib import Path

import pytest

from mixcon_jax import config as configs
from mixcon_jax.models import accounting

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / 'experiments').rglob('*.py') if path.name != '__init__.py')


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiment_is_valid_and_documented(path):
    config = configs.validate(configs.load(str(path)))
    assert config.name
    assert len(ast.get_docstring(ast.parse(path.read_text())) or '') > 80


def test_the_quickstart_is_a_whole_mixcon():
    model = configs.validate(configs.load(str(ROOT / 'experiments' / 'quickstart.py'))).model
    assert accounting.parameter_count(model).total >= 1_200_000
    layers = ' '.join(model.pattern)
    assert all(part in layers for part in ('conba', 'attention', 'moe'))


@pytest.mark.parametrize('preset', ['conba', 'conba_paper', 'conba_code'])
def test_the_papers_model_takes_a_preset(preset):
    config = configs.load(f'{ROOT}/experiments/mixcon/paper.py:{preset}')
    assert config.model.conba.state_scaling == ('output' if preset == 'conba' else 'readout')
