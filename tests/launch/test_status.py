"""The status of a sweep's cases, and how long they take, where a run cannot be read or its file is long."""

import json
import re

import pytest

from launch.sweep import sweep
from launch.sweep.cases import Case
from launch.sweep.estimate import Estimate, Sizes
from launch.sweep.status import TimedRun
from mixcon_jax import config as configs
from mixcon_jax.errors import Exit
from tests.tiny import ROOT


@pytest.fixture
def case(tmp_path):
    """A case of 100 steps that has recorded 1,000 tokens/s, in the folder of its sweep."""
    config = configs.default()
    config.update({'train': {'steps': 100, 'batch_size': 2}, 'data': {'seq_len': 50}})
    case = Case('run', 'run', 'experiment.py', (), configs.validate(config))
    (tmp_path / 'run').mkdir()
    written(tmp_path / 'run', {'kind': 'train', 'step': 10, 'loss': 2.0, 'tokens_per_second': 1000.0})
    return case


def written(folder, *records):
    with open(folder / 'metrics.jsonl', 'a') as file:
        file.writelines(json.dumps(record) + '\n' for record in records)


def test_an_estimate_passes_over_a_run_that_cannot_be_read(case, tmp_path):
    """What was known of it stays, and a sweep goes on."""
    estimate = Estimate([case], tmp_path, Sizes())
    assert estimate.seconds(case, 100) == 10
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    metrics.unlink()
    metrics.symlink_to('metrics.jsonl')
    estimate.look([case])
    assert estimate.seconds(case, 100) == 10
    assert Estimate([case], tmp_path, Sizes()).seconds(case, 100) is None


def test_the_longest_start_counts_once_it_made_half_of_the_steps(case, tmp_path):
    """And each look reads only what is new."""
    run = TimedRun(tmp_path / 'run')
    assert run.update() and run.whole_speed(case) == 1000
    written(tmp_path / 'run', {'kind': 'run', 'step': 40, 'event': 'stopped', 'seconds': 80.0})
    assert run.update() and run.whole_speed(case) == 1000
    written(tmp_path / 'run', {'kind': 'run', 'step': 40, 'event': 'resumed'})
    written(tmp_path / 'run', {'kind': 'run', 'step': 100, 'event': 'stopped', 'seconds': 15.0})
    assert run.update() and run.whole_speed(case) == 60 * 100 / 15 and run.steps_speed() == 1000


def test_of_a_long_file_the_speed_is_the_median_of_some_records(case, tmp_path, monkeypatch):
    rates = [100.0, *range(1000, 21_000), 1e9]
    train = ({'kind': 'train', 'step': 11, 'loss': 2.0, 'tokens_per_second': rate} for rate in rates)
    written(tmp_path / 'run', *train)
    taken, take = [], TimedRun._take
    monkeypatch.setattr(TimedRun, '_take', lambda run, line: (taken.append(line), take(run, line))[1])
    run = TimedRun(tmp_path / 'run')
    assert run.update() and len(taken) < 1000
    assert 9_000 < run.steps_speed() < 14_000


def test_the_help_names_every_exit_code_that_a_sweep_ends_with():
    """As docs/run-directory.md does."""
    codes = {Exit.DONE, Exit.FAILED, Exit.USER_ERROR, Exit.STOPPED, Exit.INTERRUPTED}
    assert set(map(int, re.findall(r'(?<=[ ,])\d+(?= )', sweep.EPILOG.partition('Exit codes:')[2]))) == codes
    page = (ROOT / 'docs' / 'run-directory.md').read_text()
    (line,) = re.findall(r'^`python -m launch.sweep` ends .*?cases\. ', page, re.MULTILINE | re.DOTALL)
    assert set(map(int, re.findall(r'\d+', line))) == codes
