"""A synthetic task through training, evaluation and resuming."""

import shutil

import pytest

from mixcon_jax import cli
from mixcon_jax.data.synthetic import SyntheticTrain
from mixcon_jax.errors import UserError
from mixcon_jax.evaluate import evaluate
from mixcon_jax.runs.records import last, read
from mixcon_jax.train import train
from tests.tiny import tiny_config, write_experiment


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp('task'), model__pattern=('mamba', 'attention+mlp'))
    config.data.sources = ('synthetic:selective_copying',)
    task = config.data.synthetic
    task.symbols, task.num_items, task.eval_lengths, task.eval_rows = 8, 3, (48, 16), 10
    task.min_items, task.min_length, task.curriculum_steps = 1, 8, 4
    config.train.steps, config.checkpoint.every, config.eval.every = 6, 2, 3
    return config


@pytest.fixture(scope='module')
def done(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'whole'
    return folder, train(config, folder)


def test_scores_are_of_all_lengths_and_of_each(done):
    _, result = done
    scores = result.metrics
    assert scores['bits_per_byte'] is None and scores['bytes'] == 0 and scores['tokens'] == 2 * 10 * 3
    assert set(scores['by_length']) == {'16', '48'}
    parts = scores['by_length'].values()
    assert all(part['tokens'] == 30 and 0 <= part['accuracy'] <= 1 for part in parts)
    assert scores['accuracy'] == pytest.approx(sum(part['accuracy'] for part in parts) / 2)
    assert scores['loss'] == pytest.approx(sum(part['loss'] for part in parts) / 2)
    assert scores['baselines']['chance'] == 1 / 8 < scores['baselines']['context'] < 1


def test_a_checkpoint_is_scored_as_at_the_end_of_its_run(done, capsys):
    folder, result = done
    scores = evaluate(folder)
    assert scores.accuracy == result.metrics['accuracy']
    assert scores.loss == pytest.approx(result.metrics['loss'], rel=1e-5)
    assert {str(length): part.tokens for length, part in scores.by_length.items()} == {'16': 30, '48': 30}
    with pytest.raises(SystemExit) as end:
        cli.main(['eval', '--workdir', str(folder), '--batch-size', '3'])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f'accuracy {scores.accuracy:.4f} over 60 answers' in printed and '48 tokens: accuracy' in printed


def test_scores_of_other_lengths_are_not_the_runs_last(config, done, tmp_path):
    """Of a run that went on at its last step, with other lengths to score at, which have as many answers."""
    folder = tmp_path / 'run'
    shutil.copytree(done[0], folder)
    lines = (folder / 'metrics.jsonl').read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"final"' not in line and '"done"' not in line]
    (folder / 'metrics.jsonl').write_text(''.join(kept))
    other = config.copy_and_resolve_references()
    other.data.synthetic.eval_lengths = (40, 16)
    result = train(other, folder)
    assert result.metrics['lengths'] == [16, 40] and result.metrics['tokens'] == done[1].metrics['tokens']
    assert (
        result.metrics['loss']
        == pytest.approx(evaluate(folder, lengths=(16, 40)).loss, rel=1e-5)
        != done[1].metrics['loss']
    )


def test_a_checkpoint_is_scored_at_lengths_that_its_run_did_not_score(done, capsys, tmp_path):
    folder, result = done
    (tmp_path / 'a.txt').touch()

    def scored(*lengths):
        with pytest.raises(SystemExit) as end:
            cli.main(['eval', '--workdir', str(folder), '--lengths', *map(str, lengths)])
        return end.value.code, capsys.readouterr()

    code, printed = scored(16, 64)
    assert code == 0 and '64 tokens: accuracy' in printed.out and '48 tokens' not in printed.out
    assert f'16 tokens: accuracy {result.metrics["by_length"]["16"]["accuracy"]:.4f} over 30 answers' in printed.out
    code, printed = scored(4)
    assert code == 2 and 'eval_lengths: 4 tokens are too few for selective_copying' in printed.err
    for lengths in ([], [64]):
        with pytest.raises(UserError, match='was trained on synthetic:selective_copying, not on text'):
            evaluate(folder, [str(tmp_path / 'a.txt')], lengths=lengths)


def test_an_interrupted_run_ends_with_the_same_parameters(config, done, tmp_path, monkeypatch):
    def breaks(self, start=0):
        yield from (self[step] for step in range(start, 3))
        raise RuntimeError('the machine is gone')

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticTrain, 'iterate', breaks)
        with pytest.raises(RuntimeError, match='the machine is gone'):
            train(config, tmp_path / 'run')
    assert train(config, tmp_path / 'run').fingerprint == done[1].fingerprint
    assert last(read(tmp_path / 'run' / 'metrics.jsonl'), event='resumed')['step'] == 2


def test_there_is_nothing_to_prepare(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(['data', 'prepare', '--config', str(write_experiment(tmp_path / 'task.py', config))])
    assert end.value.code == 0 and 'nothing to prepare' in capsys.readouterr().out
