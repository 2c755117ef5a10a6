"""A run as its directory tells: training, sweep, report and watch read it in one place and say the same of it."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from launch.sweep import status
from launch.sweep.cases import Case
from mixcon_jax import parsing
from mixcon_jax.reports import runs
from mixcon_jax.runs import saved, workdir
from mixcon_jax.runs.records import last, read
from mixcon_jax.runs.run import Run, run_folders
from mixcon_jax.train import train
from mixcon_jax.watching import follow
from mixcon_jax.watching import watch as watching
from tests.test_watch import shown
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
        'sweep': status.status_of(Case('run', 'run', 'x.py', (), config), sweep).state == status.DONE,
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
        {'baselines': {'gzip': 10**400}},
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
        for part in (line[:-7], line[-7:-1], b'\n'):
            with open(path, 'ab') as file:
                file.write(part)
            assert run.update()
            assert run.step == max((record['step'] for record in read(path)), default=0)
        known = read(path)
        complete = last(known, kind='checkpoint')
        assert run.event == last(known, kind='run') and run.step == max(record['step'] for record in known)
        assert run.last_saved == (complete['step'] if complete else None)
    assert (run.state, run.step, run.last_saved, run.saved_steps()) == ('done', 4, 4, [2, 4])
    path.unlink()
    path.write_bytes(lines[0])
    assert run.update() and (run.state, run.step, run.last_saved) == ('unfinished', 0, None)
    path.unlink()
    assert not run.update() and run.event is None and read(path) == []


def test_who_only_reads_a_run_loads_neither_jax_nor_numpy(trained):
    """In an interpreter of its own, whatever the modules in between import."""
    sweep, _ = trained
    code = (
        'import pathlib, sys\nfrom mixcon_jax.runs.run import Run\n'
        'run = Run(pathlib.Path(sys.argv[1]))\nrun.update()\n'
        'print(run.state, run.steps, run.step)\n'
        'print(sorted({"jax", "jaxlib", "numpy", "orbax"} & set(sys.modules)))'
    )
    command = [sys.executable, '-c', code, str(sweep / 'run')]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == 'done 4 4\n[]\n', result.stderr


# ----- what cannot be read ------------------------------------------------------------------------------------------


def looped(folder, name):
    """Puts a link to itself in the place of something in a run's folder: any read of it fails, whoever asks."""
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize('name', ['checkpoints', 'metrics.jsonl'])
def test_one_run_that_cannot_be_read_ends_nothing_else(copied, name):
    """Not a report, a dashboard or a sweep over others: each names it and goes on."""
    sweep, config = copied
    shutil.copytree(sweep / 'run', sweep / 'other')
    looped(sweep / 'run', name)
    words = f'{sweep / "run" / name} cannot be read ({os.strerror(errno.ELOOP)})'
    found, notes = runs.find([sweep])
    assert [run.path.name for run in found] == ['other'] and notes == [f'left out: {words}']
    watched = {run.path.name: run for run in follow.Runs([sweep]).update()}
    assert {name: run.status(run.seen + 1) for name, run in watched.items()} == {'run': 'unreadable', 'other': 'done'}
    assert watched['run'].unreadable == words
    text = shown(watching.view(list(watched.values()), 0, 100, shown=watched['run']), 100)
    assert '1 unreadable' in text and os.strerror(errno.ELOOP) in ' '.join(text.split())
    refused = status.status_of(Case('run', 'run', 'x.py', (), config), sweep)
    assert (refused.state, refused.error) == (status.REFUSED, words)
    assert status.status_of(Case('other', 'other', 'x.py', (), config), sweep).state == status.DONE


def test_a_run_that_can_be_read_again_is_shown_again(copied):
    sweep, _ = copied
    looks, kept = follow.Runs([sweep]), sweep / 'kept'
    assert [run.status(run.seen) for run in looks.update()] == ['done']
    (sweep / 'run' / 'checkpoints').rename(kept)
    (sweep / 'run' / 'checkpoints').symlink_to('checkpoints')
    assert [run.status(run.seen) for run in looks.update()] == ['unreadable']
    (sweep / 'run' / 'checkpoints').unlink()
    kept.rename(sweep / 'run' / 'checkpoints')
    assert [(run.status(run.seen), run.steps) for run in looks.update()] == [('done', 4)]


def test_files_that_go_while_they_are_looked_at_are_missing(copied, monkeypatch):
    """As when the checkpoints are being deleted."""
    sweep, _ = copied
    checkpoints, walk = sweep / 'run' / 'checkpoints', os.walk
    assert saved.is_whole(checkpoints, 4)

    def late(top):
        listed = list(walk(top))
        shutil.rmtree(checkpoints / '4' / 'optimizer', ignore_errors=True)
        return listed

    monkeypatch.setattr(os, 'walk', late)
    assert not saved.is_whole(checkpoints, 4)


@pytest.mark.parametrize('lost', ['config.json', 'metrics.jsonl', 'checkpoints'])
def test_the_report_and_the_watch_look_at_the_same_folders(copied, lost):
    """Also where a run has lost a part of itself, which both say."""
    sweep, _ = copied
    if (sweep / 'run' / lost).is_dir():
        shutil.rmtree(sweep / 'run' / lost)
    else:
        (sweep / 'run' / lost).unlink()
    shutil.copytree(sweep / 'run', sweep / 'run' / 'inside')
    watched = sorted(run.path for run in follow.Runs([sweep]).update())
    assert watched == sorted(run_folders([sweep])) == [sweep / 'run', sweep / 'run' / 'inside']


# ----- what a look costs and misses ---------------------------------------------------------------------------------


def test_of_a_long_file_a_run_parses_no_more_training_records_than_it_needs(tmp_path, monkeypatch):
    """Whoever asks for its step while it watches over others must not wait for 100 MB of JSON."""
    lines = [{'kind': 'run', 'step': 0, 'event': 'started'}]
    lines += [{'kind': 'train', 'step': step, 'loss': 2.0} for step in range(1, 5001)]
    lines.insert(2500, {'kind': 'checkpoint', 'step': 2400})
    text = ''.join(json.dumps(line) + '\n' for line in lines) + '{"kind": "train", "step": 50'
    (tmp_path / 'metrics.jsonl').write_text(text)
    parsed, record = [], parsing.record
    monkeypatch.setattr(parsing, 'record', lambda line: (parsed.append(line), record(line))[1])
    run = Run(tmp_path)
    assert run.update() and (run.step, run.last_saved, run.event['event']) == (5000, 2400, 'started')
    assert len(parsed) < 10


def test_whoever_asks_again_is_told_what_has_changed_since(copied):
    """An item of the last checkpoint that has gone, and another number of steps."""
    sweep, _ = copied
    run, path = Run(sweep / 'run'), sweep / 'run' / 'config.json'
    assert run.update() and run.state == 'done'
    text = path.read_text()
    path.write_text(text.replace('"steps": 4', '"steps": 8'))
    os.utime(path, ns=(1, 1))
    assert run.update() and (run.steps, run.state) == (8, 'unfinished')
    path.write_text(text)
    assert run.update() and run.state == 'done'
    (sweep / 'run' / 'checkpoints' / '4' / 'model' / 'manifest.ocdbt').unlink()
    assert run.update() and run.state == 'unfinished'
