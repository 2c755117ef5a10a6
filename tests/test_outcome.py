"""What became of a run: training, sweep, report and watch say the same of every folder."""

import shutil

import pytest

from launch.sweep import status
from launch.sweep.cases import Case
from mixcon_jax.reports import runs
from mixcon_jax.runs import workdir
from mixcon_jax.runs.records import last, read
from mixcon_jax.train import train
from mixcon_jax.watching import follow
from tests.tiny import tiny_config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of four steps with checkpoints after two and four, and its configuration."""
    folder = tmp_path_factory.mktemp('outcome')
    config = tiny_config(folder, train__steps=4, eval__every=2, checkpoint__every=2, optim__schedule='constant')
    config.model.pattern = ('mamba',)
    train(config, folder / 'sweep' / 'run')
    return folder / 'sweep', config


def told(sweep, config):
    """Whether it is done by each of the five who read the folder."""
    folder = sweep / 'run'
    watched = follow.WatchedRun(folder)
    watched.update()
    now = watched.seen + 1
    return {
        'train': workdir.report_if_finished(config, folder) is not None,
        'workdir': workdir.Workdir(folder).finished(config) is not None,
        'sweep': status.status_of(Case('run', 'run', (), config), sweep).state == status.DONE,
        'report': runs.read(folder)[0].state == 'done',
        'watch': watched.status(now) == 'done',
    }


@pytest.fixture
def copied(trained, tmp_path):
    sweep, config = trained
    shutil.copytree(sweep, tmp_path / 'sweep')
    return tmp_path / 'sweep', config


def test_a_run_that_is_done_is_done_for_all(copied):
    assert set(told(*copied).values()) == {True}


def test_without_checkpoints_it_stays_done_with_its_scores(copied, capsys):
    """People delete checkpoints to save room: nobody takes that for a wish to train again."""
    sweep, config = copied
    shutil.rmtree(sweep / 'run' / 'checkpoints')
    assert set(told(sweep, config).values()) == {True}
    assert 'its checkpoints are gone, and its weights with them; another workdir trains anew' in capsys.readouterr().out
    assert runs.read(sweep / 'run')[0].final['loss'] > 0
    before = read(sweep / 'run' / 'metrics.jsonl')
    train(config, sweep / 'run')
    assert read(sweep / 'run' / 'metrics.jsonl') == before


def test_with_the_last_checkpoint_damaged_it_goes_on_for_all(copied):
    sweep, config = copied
    shutil.rmtree(sweep / 'run' / 'checkpoints' / '4' / 'model')
    assert set(told(sweep, config).values()) == {False}


def test_a_watch_that_is_open_follows_a_run_that_is_made_longer(copied):
    sweep, config = copied
    watched = follow.WatchedRun(sweep / 'run')
    watched.update()
    assert (watched.status(watched.seen), watched.steps) == ('done', 4)
    longer = config.copy_and_resolve_references()
    longer.train.steps = 6
    train(longer, sweep / 'run')
    watched.update()
    assert (watched.status(watched.seen), watched.steps, watched.step) == ('done', 6, 6)


def test_with_more_steps_wanted_it_goes_on_for_all(copied):
    """Once a start has written the new number down, as it does before its first step."""
    sweep, config = copied
    longer = config.copy_and_resolve_references()
    longer.train.steps = 8
    path = sweep / 'run' / 'config.json'
    path.write_text(path.read_text().replace('"steps": 4', '"steps": 8'))
    assert set(told(sweep, longer).values()) == {False}
    assert last(read(sweep / 'run' / 'metrics.jsonl'), kind='run')['event'] == 'done'
