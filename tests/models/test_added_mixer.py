"""The mixer of docs/howto-mixer.md, as the page has it: one file and one line, and all else follows.

tests/test_docs.py runs the page as printed, with the suite of invariants and a training, among the slow tests.
"""

import difflib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax.cli import main
from mixcon_jax.models import declared, mixers, pattern
from mixcon_jax.models.accounting import flops_per_token, parameter_count, parameters, state_bytes
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import create
from tests.models import cases
from tests.test_docs import ROOT, hooks, steps
from tests.tiny import tiny_config, write_experiment

PAGE = list(steps('docs/howto-mixer.md'))
MODULE = 'mixcon_jax.models.mixers.mingru'


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The page's file in a folder that the package of mixers also has, and its line in the registry."""
    (file,) = (step for step in PAGE if step.path)
    (line,) = (step for step in PAGE if 'mixers/__init__.py' in step.text and not step.path)
    folder = tmp_path / 'mixcon_jax' / 'models' / 'mixers'
    folder.mkdir(parents=True)
    registry = folder / '__init__.py'
    before = (ROOT / registry.relative_to(tmp_path)).read_text()
    registry.write_text(before)
    subprocess.run(['bash', '-euc', line.text], cwd=tmp_path, check=True)
    lines = difflib.ndiff(before.splitlines(), registry.read_text().splitlines())
    assert [each for each in lines if each[0] in '+-'] == [f"+     'mingru': '{MODULE}.MinGRU',"]
    (tmp_path / file.path).write_text(file.text)
    monkeypatch.setattr(mixers, '__path__', [*mixers.__path__, str(folder)])
    monkeypatch.setitem(mixers.MIXERS, 'mingru', runpy.run_path(str(registry))['MIXERS']['mingru'])
    yield
    sys.modules.pop(MODULE, None)
    declared.of_source.cache_clear()


def model_config(**options):
    config = configs.default()
    config.model.update(dim=32, vocab_size=61, num_blocks=3, pattern=('mingru+mlp', 'attention'))
    config.model.update(options)
    return configs.validate(config).model


def test_its_options_stand_wherever_options_do_before_its_file_is_run(added, tmp_path, capsys):
    config = tiny_config(tmp_path, model__pattern=('mingru+mlp',), model__mingru__expand=3)
    experiment = write_experiment(tmp_path / 'experiment.py', config)
    with pytest.raises(SystemExit) as ended:
        main(['config', f'--config={experiment}', '--config.model.mingru.candidate=positive', '--help-options'])
    out, _ = capsys.readouterr()
    assert ended.value.code == 0
    assert 'model.mingru.expand = 3\n    Width of the state as a multiple of dim.\n' in out
    assert "model.mingru.candidate = 'positive'\n" in out
    reference = hooks.options_page()
    assert '## model.mingru {' in reference
    assert '| `model.mingru.expand`{ #model.mingru.expand } | `2` | Width of the state' in reference
    config.model.mingru.expand = 0
    with pytest.raises(configs.ConfigError, match=r'^model\.mingru\.expand=0 must be at least 1$'):
        configs.validate(config)
    layers = {'wide': {'kind': 'mingru', 'expand': 4}}
    assert pattern.parts(model_config(layers=layers), 'wide')['mixer'].model.mingru.expand == 4
    assert MODULE not in sys.modules


def test_its_operations_parameters_and_state_are_counted(added):
    model, without = model_config(), model_config(pattern=('attention', 'attention'))
    inner = 2 * 32
    matrices = 3 * 3 * 32 * inner  # in three blocks: gate, candidate and output
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * model.mlp.hidden_dim
    norm = 32
    assert parameter_count(model).total - parameter_count(without).total == (
        matrices + 3 * (inner + mlp + norm - attention)
    )
    products = 2 * (matrices + 3 * (mlp - attention))
    scores = 3 * 2 * 32 * 256
    assert flops_per_token(model, 256) - flops_per_token(without, 256) == 3 * (products + 3 * 3 * inner - scores)
    lone = model_config(pattern=('mingru',))
    assert state_bytes(lone, 64) == state_bytes(lone, 4096) == 3 * inner * 4
    axes = {path: named for path, _, named in parameters(model) if 'layers/0/mixer/' in path}
    assert axes['blocks/layers/0/mixer/gate_proj'] == ('layers', 'embed', 'inner')


def test_its_statistics_are_reported_and_described(added):
    model = create(model_config(), 0)
    aux = jax.jit(lambda ids: model(ids, Context.whole(2, 9))[2])(jnp.ones((2, 9), jnp.int32))
    assert aux['stats'].keys() == {'layer_0/update'}
    np.testing.assert_allclose(aux['stats']['layer_0/update'], [0.5] * 3, atol=0.05)  # of gates that start near 1/2
    described = pattern.statistics(('mingru+mlp',), {})
    assert described['update'].title == 'minGRU: gate'


def test_it_is_in_the_suite_of_the_invariants(added):
    assert cases.of_every_kind()['mingru'] == ('mingru', {'pattern': ('mingru',)})
    assert any('test_invariants.py' in step.text and '-k mingru' in step.text for step in PAGE)
