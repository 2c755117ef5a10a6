"""A process that goes on running but gets nowhere ends the job and is named; what merely takes long does not."""

import subprocess
import sys

import pytest

from mixcon_jax.runs.records import last, read
from tests.launch.launching import finish, launch, small_config
from tests.tiny import ROOT, write_experiment

WATCHED = """
import re, sys, time
from mixcon_jax.host import stuck

stuck.SPARE = 0.5
stuck.PULSE = 0.1
stuck.watch(1, lambda: 'process 1 of 2', 5)
{what}
print('alive')
"""


def watched(what: str) -> subprocess.CompletedProcess:
    """Runs a program under watch, of which a second is too long."""
    command = [sys.executable, '-c', WATCHED.format(what=what)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_stretch_of_own_work_that_takes_too_long_ends_the_process_and_shows_where():
    ended = watched('def circle():\n    while True: pass\nwith stuck.own():\n    circle()')
    assert ended.returncode == 5 and 'alive' not in ended.stdout
    assert 'in circle' in ended.stderr
    assert ended.stderr.splitlines()[-1] == 'error: process 1 of 2 was stuck here for 1 s'


def test_so_does_one_that_holds_pythons_lock():
    ended = watched("with stuck.own():\n    re.match('(a+)+$', 64 * 'a' + 'b')")
    assert ended.returncode == 1 and 'alive' not in ended.stdout
    assert 'in match' in ended.stderr  # what Python's own timer says


def test_waiting_is_not_bounded_nor_is_work_that_gets_on():
    slowly = 'def slowly():\n    for i in range(6):\n        time.sleep(0.3)\n        yield i\n'
    ended = watched(f'time.sleep(1.5)\n{slowly}assert list(stuck.each(slowly())) == list(range(6))\ntime.sleep(1.5)')
    assert (ended.returncode, ended.stdout) == (0, 'alive\n'), ended.stderr


# Appended to an experiment file. In the second process: with STUCK in the environment the sixth batch never comes; with
# SLOW what may take long does, evaluation and saving, and the first call of the step as if it were compiled for longer.
FAULTS = """

import os, sys, time

if '--rank' in sys.argv and sys.argv[sys.argv.index('--rank') + 1] == '1':
    from mixcon_jax import step
    from mixcon_jax.data.loader import HeldoutBatches, TrainBatches
    from mixcon_jax.runs.checkpoints import Checkpoints

    def later(owner, name, seconds):
        inner = getattr(owner, name)

        def late(*args, **kwargs):
            time.sleep(seconds)
            return inner(*args, **kwargs)

        setattr(owner, name, late)

    if os.environ.get('STUCK'):
        iterate = TrainBatches.iterate

        def never(self, start=0):
            for number, batch in enumerate(iterate(self, start)):
                while number == 5:
                    pass
                yield batch

        TrainBatches.iterate = never
    if os.environ.get('SLOW'):
        later(HeldoutBatches, '__getitem__', 2)
        later(Checkpoints, 'save', 6)
        later(step, 'train_step', 6)  # while it is traced
"""
PATIENCE = 4


@pytest.mark.slow
def test_one_of_two_processes_that_gets_nowhere_is_named_and_the_run_goes_on(tmp_path):
    config = small_config(
        tmp_path, train__steps=8, checkpoint__every=4, log__every=1, eval__batch_size=2, data__prefetch=0
    )
    experiment = write_experiment(tmp_path / 'experiment.py', config)
    experiment.write_text(experiment.read_text() + FAULTS)

    def start(**environment: str):
        options = ('--processes', 2, '--config', experiment, '--workdir', tmp_path / 'run', '--patience', PATIENCE)
        return launch('launch.local', *options, environment=environment)

    output = finish(start(STUCK='1'), code=1)
    assert 'error: process 1 of 2 failed (exit code 1); all were stopped' in output
    assert f'error: process 1 of 2 was stuck here for {PATIENCE} s' in output and 'in never' in output

    output = finish(start(SLOW='1'))
    assert 'going on after step 4' in output and 'stuck' not in output
    assert last(read(tmp_path / 'run' / 'metrics.jsonl'), kind='run')['event'] == 'done'
