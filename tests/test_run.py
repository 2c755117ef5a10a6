"""A run as its directory tells: training, sweep, report and watch read it in one place and say the same of it."""

import json
import shutil
import subprocess
import sys

import pytest

from launch.sweep import status
from launch.sweep.cases import Case
from mixcon_jax.reports import runs
from mixcon_jax.runs import workdir
from mixcon_jax.runs.records import last, read
from mixcon_jax.runs.run import Run
from mixcon_jax.train import train
from mixcon_jax.watching import follow
from tests.tiny import ROOT, tiny_config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of four steps with checkpoints after two and four, and its configuration."""
    folder = tmp_path_factory.mktemp('run')
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
        'report': runs.ReportedRun(folder).state == 'done',
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
    assert runs.ReportedRun(sweep / 'run').final['loss'] > 0
    before = read(sweep / 'run' / 'metrics.jsonl')
    train(config, sweep / 'run')
    assert read(sweep / 'run' / 'metrics.jsonl') == before


@pytest.mark.parametrize(
    'damage',
    [
        {'loss': None},
        {'loss': ...},
        {'bytes': ...},
        {'fingerprint': ...},
        {'fingerprint': 3},
        {'baselines': {'gzip': 'x'}},
    ],
)
def test_an_end_without_all_that_is_shown_of_it_is_none_for_all(copied, damage):
    """Scores and fingerprint: whatever wrote the record, it was not the end of our training."""
    sweep, config = copied
    path = sweep / 'run' / 'metrics.jsonl'
    *lines, end = path.read_text().splitlines(keepends=True)
    record = {key: value for key, value in (json.loads(end) | damage).items() if value is not ...}
    path.write_text(''.join([*lines, json.dumps(record) + '\n']))
    assert set(told(sweep, config).values()) == {False}
    assert Run(sweep / 'run').state == 'unfinished'


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


def test_what_a_run_knows_grows_with_its_records(copied):
    """Taken one by one as they come, and anew where the file is another one or is gone."""
    sweep, _ = copied
    run, path = Run(sweep / 'run'), sweep / 'run' / 'metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b'')
    for line in lines:
        for part in (line[:-7], line[-7:]):
            with open(path, 'ab') as file:
                file.write(part)
            assert run.update()
        known, saved = run.read(), last(run.read(), kind='checkpoint')
        assert run.event == last(known, kind='run') and run.step == max(record['step'] for record in known)
        assert run.last_saved == (saved['step'] if saved else None)
    assert (run.state, run.step, run.last_saved, run.saved_steps()) == ('done', 4, 4, [2, 4])
    path.unlink()
    path.write_bytes(lines[0])
    assert run.update() and (run.state, run.step, run.last_saved) == ('unfinished', 0, None)
    path.unlink()
    assert not run.update() and run.event is None and run.read() == []


def test_who_only_reads_a_run_loads_neither_jax_nor_numpy(trained):
    """In an interpreter of its own, whatever the modules in between import."""
    sweep, _ = trained
    code = (
        'import pathlib, sys\nfrom mixcon_jax.runs.run import Run\n'
        'run = Run(pathlib.Path(sys.argv[1]))\nrun.update()\n'
        'print(run.state, run.steps, len(run.read()) > 0)\n'
        'print(sorted({"jax", "jaxlib", "numpy", "orbax"} & set(sys.modules)))'
    )
    command = [sys.executable, '-c', code, str(sweep / 'run')]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == 'done 4 True\n[]\n', result.stderr
