"""Scores and samples of a checkpoint on a mesh are those of one device, whatever mesh it was trained on."""

import pytest

from mixcon_jax import cli
from mixcon_jax.config import mesh_of
from mixcon_jax.errors import ConfigError
from mixcon_jax.evaluate import evaluate
from mixcon_jax.inference.generate import Sampling, generate_text
from mixcon_jax.inference.load import load_model
from mixcon_jax.train import train
from tests.tiny import tiny_config

SMALL = {'train__steps': 2, 'eval__every': 0, 'model__attention__num_kv_heads': 2}
SMALL |= {'optim__learning_rate': 0.02, 'optim__warmup_steps': 0, 'model__init_std': 0.3}  # logits far apart
WIDTHS = ('mesh.fsdp=2', 'mesh.tensor=2')  # of eight devices: mesh.data takes what they leave


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run trained on a mesh other than those it is tested on."""
    folder = tmp_path_factory.mktemp('run')
    options = SMALL | {'model__pattern': ('mamba', 'attention+mlp'), 'mesh__fsdp': 4}
    train(tiny_config(folder, **options), folder / 'run')
    return folder / 'run'


def sampled(run, mesh, prompts):
    sampling = Sampling(1.0, top_k=50)
    options = {'max_new_tokens': 8, 'num_samples': 2, 'sampling': sampling, 'seed': 3}
    return generate_text(run, prompts, mesh=mesh, **options)


def assert_same_scores(run, mesh):
    ours, theirs = evaluate(run, mesh=mesh), evaluate(run)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5) and ours.tokens == theirs.tokens > 100
    assert ours.bits_per_byte == pytest.approx(theirs.bits_per_byte, rel=1e-5)


FOUR = pytest.param(['the state', 'of a'], marks=pytest.mark.slow)


@pytest.mark.parametrize('prompts', [FOUR, ['the', 'a loop', '']], ids=['4', '6'])
def test_scores_and_samples_on_a_mesh_are_those_of_one_device(run, prompts):
    """Rows of scores, which the mesh divides, and six samples, which it does not; four have the scores' way."""
    assert_same_scores(run, WIDTHS)
    ours, theirs = sampled(run, WIDTHS, prompts), sampled(run, (), prompts)
    assert ours == theirs and len(set(ours)) == 2 * len(prompts)


def test_every_device_gets_its_part_of_the_parameters_and_no_more(run, monkeypatch):
    embedding = load_model(run, mesh=WIDTHS).model.embedding[...]
    assert len(embedding.sharding.device_set) == 8
    vocabulary, width = embedding.shape
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(vocabulary // 2, width // 2)}
    assert len(load_model(run).model.embedding[...].sharding.device_set) == 1


@pytest.mark.parametrize(
    'given, message',
    [
        (['--config.mesh.tensor=4'], 'mesh.tensor=4 must divide model.attention.num_heads=2'),
        (['--config.mesh.tensor=3'], 'must be the number of devices, 8'),
        (['--config.model.dim=8'], 'override model.dim: a checkpoint has its own options'),
        (['--config.mesh.fspd=2'], 'did you mean mesh.fsdp?'),
        (['--config.mesh.fsdp=two'], 'mesh.fsdp=two must be a whole number'),
        (['--batch-size=3', '--config.mesh.fsdp=2'], 'must divide --batch-size=3'),
    ],
    ids=lambda case: case if isinstance(case, str) else ' '.join(case),
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(run, capsys, given, message):
    with pytest.raises(SystemExit) as end:
        cli.main(['eval', '--workdir', str(run), *given])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count('\n') == 1, error


def test_the_options_of_a_mesh_are_their_defaults_but_for_those_given():
    assert mesh_of(['mesh.rules=vocab=/embed=fsdp+expert', 'mesh.data=2']).rules == ('vocab=', 'embed=fsdp+expert')
    assert mesh_of(()).data == -1
    with pytest.raises(ConfigError, match='at least 1'):
        mesh_of(['mesh.fsdp=0'])


@pytest.mark.slow
def test_experts_on_several_devices_drop_nothing_when_they_are_scored(tmp_path):
    """Though in training they did: the run's capacity has no room for most tokens."""
    options = {'model__pattern': ('conba+moe', 'attention+mlp'), 'model__moe__num_experts': 4, 'mesh__expert': 2}
    options |= {'model__moe__implementation': 'grouped', 'model__moe__capacity': 0.25, 'model__moe__top_k': 2}
    train(tiny_config(tmp_path, **SMALL | options), tmp_path / 'run')
    for mesh in (('mesh.expert=4',), ('mesh.data=1', 'mesh.fsdp=2', 'mesh.expert=2', 'mesh.tensor=2')):
        assert_same_scores(tmp_path / 'run', mesh)
        for prompts in (['the state', 'of a', 'loop', 'noise'], ['the']):
            assert sampled(tmp_path / 'run', mesh, prompts) == sampled(tmp_path / 'run', (), prompts)
