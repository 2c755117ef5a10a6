"""How runs are followed by their files: what is read of them, and how each is doing."""

import json
import math
import os
import shutil
import time

import numpy as np
import pytest

from mixcon_jax.parsing import number
from mixcon_jax.reports import runs
from mixcon_jax.runs import saved
from mixcon_jax.runs.records import RecordLog, keep_until
from mixcon_jax.watching import follow
from mixcon_jax.watching import watch as watching
from mixcon_jax.watching.follow import Curve, Runs, WatchedRun
from tests.test_watch import RUNNING, STARTED, append, event, known, opened, scores, shown, steps, text_of, train, write

# ----- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', range(5))
def test_however_the_file_grows_each_whole_line_is_read_once(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    records = [STARTED, *steps(1, 101), scores(101, 1062), event('done', 101, 1063)]
    raw = text_of(records[:5]).encode() + b'{"kind": "train", "st\xff\n[1]\nnull\n' + text_of(records[5:]).encode()
    taken, take = [], WatchedRun._take
    monkeypatch.setattr(WatchedRun, '_take', lambda self, line, *rest: (taken.append(line), take(self, line, *rest)))
    folder = write(tmp_path / 'run', [])
    run = WatchedRun(folder)
    for part in np.split(np.frombuffer(raw, np.uint8), np.sort(rng.integers(0, len(raw), 20))):
        with open(folder / 'metrics.jsonl', 'ab') as file:
            file.write(part.tobytes())
        assert run.update()
    assert b'\n'.join(taken) + b'\n' == raw
    assert run.step == 101 and run.event['event'] == 'done'
    assert known(run) == known(opened(tmp_path / 'whole', records))


def test_a_torn_last_line_waits_for_its_rest_but_not_for_its_end_of_line(tmp_path):
    folder = write(tmp_path / 'run', [STARTED, train(1, 1001)])
    run, line = WatchedRun(folder), text_of([train(10, 1002)])
    for end, step in ((20, 1), (len(line) - 2, 1), (len(line) - 1, 10), (len(line), 10)):
        write(folder, [STARTED, train(1, 1001)])
        with open(folder / 'metrics.jsonl', 'a') as file:
            file.write(line[:end])
        run.update()
        assert run.step == step


def test_a_resumed_run_goes_back_to_what_its_file_keeps(tmp_path):
    run = opened(tmp_path / 'run', [STARTED, *steps(1, 71), scores(71, 1050)])
    keep_until(run.path / 'metrics.jsonl', 31)
    append(run.path, event('resumed', 31, 2000))
    assert run.update() and run.step == 31 and run.scores is None
    assert run.status(2001) == 'starting'
    assert known(run) == known(_fresh(run))
    append(run.path, train(41, 2010), train(51, 2030))
    run.update()
    assert run.seconds_per_step() == 2, 'the pause before the resumption does not count'
    assert known(run) == known(_fresh(run))


def _fresh(run):
    other = WatchedRun(run.path)
    other.update()
    return other


@pytest.mark.parametrize('last', [11, 91], ids=['shorter', 'longer'])
def test_a_file_that_was_written_anew_in_its_place_is_read_from_its_start(tmp_path, last):
    run = opened(tmp_path / 'run', [STARTED, *steps(1, 51)], name='first')
    write(run.path, [STARTED | {'time': 5000.0}, *steps(1, last, time=5010)], name='second')
    run.update()
    assert run.step == last and run.option('name') == 'second'
    assert known(run) == known(_fresh(run))


def test_of_a_long_file_most_training_records_go_by_but_nothing_else(tmp_path, monkeypatch):
    log = RecordLog(tmp_path / 'sample.jsonl')
    log.append('train', 1, {})
    log.close()
    assert (tmp_path / 'sample.jsonl').read_bytes().startswith(b'{"kind": "train"'), 'what thinning looks for'

    records = [STARTED]
    for step in range(1, 20_001):
        records += [train(step, 1000 + step)] + ([scores(step, 1000 + step, loss=step)] if step % 1000 == 0 else [])
    taken, take = [], WatchedRun._take
    monkeypatch.setattr(WatchedRun, '_take', lambda self, *args: (taken.append(args), take(self, *args)))
    run = opened(tmp_path / 'run', records, steps=40_000)
    assert len(taken) < 1000
    assert [y for _, y in run.curves['heldout'].points] == list(range(1000, 20_001, 1000))
    assert run.train == records[-2] and run.seconds_per_step() == 1
    assert run.status(20_000 + 1000 + 59) == 'running' and run.status(20_000 + 1000 + 61) == 'silent'


@pytest.mark.parametrize('count', [1, 7, 16, 64, 1000])
def test_a_curve_keeps_its_mean_and_its_ends_in_bounded_memory(count):
    values = np.random.default_rng(count).normal(size=count)
    curve = Curve(limit=16)
    for step, value in enumerate(values):
        curve.add(step, value)
        curve.add(step, float('nan'))
    assert len(curve.points) <= 16 and curve.points[-1][0] == count - 1
    assert [step for step, _ in curve.points] == sorted({step for step, _ in curve.points})
    edges = [-1, *(int(step) for step, _ in curve.points)]
    for (_, value), first, last in zip(curve.points, edges, edges[1:], strict=False):
        assert value == pytest.approx(values[first + 1 : last + 1].mean())


def test_runs_come_and_go(tmp_path):
    runs = Runs([tmp_path / 'sweep', tmp_path / 'sweep' / 'b', tmp_path / 'none'])
    assert runs.update() == []
    write(tmp_path / 'sweep' / 'b' / 'seed-1', [STARTED])
    (tmp_path / 'sweep' / 'b' / 'seed-2').mkdir()
    (tmp_path / 'sweep' / 'b' / 'seed-2' / 'config.json').write_text('{}')
    write(tmp_path / 'sweep' / '.hidden', [STARTED])
    write(tmp_path / 'sweep' / 'b' / 'seed-1' / 'checkpoints' / '3', [STARTED])

    def names():
        runs._next_search = 0.0
        return [run.path.name for run in runs.update()]

    assert names() == ['seed-1'], 'once, however many folders lead to it'
    write(tmp_path / 'sweep' / 'a', [STARTED])
    assert names() == ['a', 'seed-1']
    shutil.rmtree(tmp_path / 'sweep' / 'b')
    assert names() == ['a']
    os.remove(tmp_path / 'sweep' / 'a' / 'metrics.jsonl')
    assert names() == []


def test_a_large_tree_is_not_searched_every_time(tmp_path, monkeypatch):
    searched = []
    monkeypatch.setattr(follow, 'run_folders', lambda roots: (searched.append(1), time.sleep(0.05), iter([]))[2])
    runs = Runs([tmp_path])
    for _ in range(5):
        runs.update()
    assert len(searched) == 1


# ----- how a run is doing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'records, now, status',
    [
        ([], 5000, 'starting'),
        ([STARTED], 1599, 'starting'),
        ([STARTED], 1601, 'silent'),
        ([STARTED, train(1, 1100)], 1101, 'running'),
        (RUNNING, 1025 + 59, 'running'),
        (RUNNING, 1025 + 61, 'silent'),
        ([*RUNNING, train(41, 1125)], 1125 + 299, 'running'),  # a record took 100 seconds once
        ([*RUNNING, train(41, 1125)], 1125 + 301, 'silent'),
        ([*RUNNING, event('stopped', 31, 1026)], 9000, 'stopped'),
        ([*RUNNING, event('aborted', 31, 1026)], 9000, 'aborted'),
        ([*RUNNING, event('done', 100, 1026)], 9000, 'done'),
        ([*RUNNING, event('stopped', 31, 1026), event('resumed', 31, 9000)], 9100, 'starting'),
        ([*RUNNING, event('stopped', 31, 1026), event('resumed', 31, 9000), train(40, 9010)], 9011, 'running'),
        ([*RUNNING, {'kind': 'checkpoint', 'step': 20, 'time': 1080}], 1090, 'running'),
    ],
)
def test_status(tmp_path, records, now, status):
    assert opened(tmp_path / 'run', records).status(now) == status


def test_seconds_left_are_the_remaining_steps_at_the_newest_pace_less_what_has_passed(tmp_path):
    run = opened(tmp_path / 'run', [STARTED], steps=100)
    assert run.seconds_left(1001) is None
    append(run.path, train(1, 1100))  # 100 seconds of compilation say nothing
    run.update()
    assert run.seconds_left(1101) is None
    append(run.path, train(11, 1120), scores(11, 1130), train(21, 1150))  # 20 steps in 50 seconds
    run.update()
    assert run.seconds_per_step() == 2.5
    assert run.seconds_left(1150) == 79 * 2.5
    assert run.seconds_left(1160) == 79 * 2.5 - 10
    assert run.seconds_left(1150 + 55) == 79 * 2.5 - 55
    assert run.seconds_left(1150 + 70) is None, 'silent'
    append(run.path, train(91, 1150 + 175), train(100, 1150 + 198))
    run.update()
    assert run.seconds_left(1150 + 199) == 0
    append(run.path, event('done', 100, 1400) | {'seconds': 400.2})
    run.update()
    assert run.seconds_left(1401) is None


def test_an_unknown_length_leaves_no_time(tmp_path):
    run = opened(tmp_path / 'run', RUNNING)
    (run.path / 'config.json').write_text('{"train": ')
    run = _fresh(run)
    assert run.steps is None and run.seconds_left(1026) is None
    assert '31/?' in shown(watching.view([run], 1026, 80), 80)


def test_numbers_that_no_float_holds_are_none():
    """Of a file that something else has written to: they count as damaged, and the run is shown."""
    for value in (10**400, -(10**400), None, '3', True, [3]):
        assert math.isnan(number(value)) and math.isnan(runs.number({'loss': value}, 'loss'))


def test_of_a_run_with_a_checkpoint_the_configuration_is_the_checkpoints(tmp_path):
    """Though config.json, which anything may have written, is there; only what may change on the way is read there."""
    folder = write(tmp_path / 'run', [STARTED], name='new name', seed=5, steps=30)
    kept = {'name': 'old', 'seed': 0, 'train': {'steps': 20}, 'model': {'dim': 8}, 'log': {'every': 10}}
    (folder / 'checkpoints' / '9' / 'meta').mkdir(parents=True)
    found = {'step': 9, 'config': kept}
    text = json.dumps({'sha256': saved.digest(found), 'contents': found})
    (folder / 'checkpoints' / '9' / 'meta' / 'metadata').write_text(text)
    assert WatchedRun(folder).configuration == kept | {'name': 'new name', 'train': {'steps': 30}}
    (folder / 'config.json').write_text('{"name": 3, "log": 4, "train": {"steps": "x", "more": 1}, "optim": {}}')
    assert WatchedRun(folder).configuration == kept
    for spoiled in ('[' * 100_000, '[]', '{'):
        (folder / 'config.json').write_text(spoiled)
        assert WatchedRun(folder).configuration == kept
