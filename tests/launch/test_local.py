"""Several processes of one machine train as one does; when one of them dies or never comes, all end and say which."""

import os
import signal
import subprocess

import numpy as np
import pytest

from launch import local
from mixcon_jax.runs.records import last, read
from mixcon_jax.train import train
from tests.launch.launching import all_end, children_of, finish, launch, small_config, wait_until
from tests.tiny import write_experiment

LATE = """
import sys, time
from mixcon_jax.config import default

def get_config():
    if '--rank' in sys.argv and sys.argv[sys.argv.index('--rank') + 1] == '1':
        print('oversleeping')
        time.sleep(600)
    return default()
"""

FAULTY = """
import sys
from mixcon_jax.config import default

def get_config():
    if '--rank' in sys.argv:
        from mixcon_jax import train

        train.train = lambda config, workdir: {}['a key']
    return default()
"""


def start(folder, config, *options, workdir: str = 'run', processes: int = 2) -> subprocess.Popen:
    """Starts the launcher with an experiment file of this configuration."""
    experiment = write_experiment(folder / 'experiment.py', config)
    options = ('--processes', processes, '--config', experiment, '--workdir', folder / workdir, *options)
    return launch('launch.local', *options)


def of_kind(run, kind: str) -> list:
    return [record for record in read(run / 'metrics.jsonl') if record['kind'] == kind]


def killed_when_one_checkpoint_is_there(launcher, run) -> str:
    """What the launcher of two processes prints when one of them is killed while both train."""
    wait_until(launcher, lambda: of_kind(run, 'checkpoint'))
    children = children_of(launcher.pid)
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    output = finish(launcher, code=1, seconds=60)
    assert all_end(children, 0), 'no process is left'
    assert 'error: process 1 of 2 failed (killed by SIGKILL' in output
    return output


def test_a_killed_process_ends_the_job(tmp_path):
    config = small_config(tmp_path, train__steps=400, checkpoint__every=4, log__every=1)
    killed_when_one_checkpoint_is_there(start(tmp_path, config), tmp_path / 'run')


@pytest.mark.slow  # the end is above, one process going on in test_resume.py, two as one in test_across_processes.py
def test_a_killed_process_ends_the_job_and_going_on_ends_as_one_process_does(tmp_path):
    """Two processes, of which one is killed; both again; then the same run in this process alone."""
    config = small_config(tmp_path, train__steps=40, checkpoint__every=4, eval__every=20, log__every=1)
    pair, alone = tmp_path / 'pair', tmp_path / 'alone'
    output = killed_when_one_checkpoint_is_there(start(tmp_path, config, workdir='pair'), pair)
    assert 'process 1 printed last:\n  ' in output

    output = finish(start(tmp_path, config, workdir='pair'))
    assert 'devices   2 x cpu, data 2' in output
    assert 'going on after step' in output
    assert train(config, alone).exit_code == 0
    for kind, keys in (('train', ('tokens', 'learning_rate')), ('eval', ('tokens', 'bytes')), ('final', ('tokens',))):
        ours, expected = of_kind(pair, kind), of_kind(alone, kind)
        assert [record['step'] for record in ours] == [record['step'] for record in expected]
        for key in keys:
            assert [record[key] for record in ours] == [record[key] for record in expected]
        losses = [[record['loss'] for record in records] for records in (ours, expected)]
        np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_process_that_never_comes_is_named(tmp_path):
    experiment = tmp_path / 'experiment.py'
    experiment.write_text(LATE)
    options = ('--processes', 2, '--config', experiment, '--workdir', tmp_path / 'run', '--timeout', 1)
    launcher = launch('launch.local', *options)
    wait_until(launcher, lambda: len(children_of(launcher.pid)) == 2)
    children = children_of(launcher.pid)
    output = finish(launcher, code=1)
    assert 'did not come within 1 s; all were stopped; --timeout sets' in output
    assert '1 of 2' in output and 'oversleeping' in output
    assert all_end(children, 0)
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_after_ctrl_c_all_save_the_same_step_and_go_on(tmp_path):
    config = small_config(tmp_path, train__steps=300, mesh__fsdp=2, mesh__data=1, log__every=1)
    run = tmp_path / 'run'
    launcher = start(tmp_path, config)
    wait_until(launcher, lambda: len(of_kind(run, 'train')) > 5)
    children = children_of(launcher.pid)
    launcher.send_signal(signal.SIGINT)
    output = finish(launcher, code=75)
    assert all_end(children, 0)
    stopped = last(read(run / 'metrics.jsonl'), kind='run')
    assert stopped['event'] == 'stopped' and (run / 'checkpoints' / str(stopped['step'])).is_dir()
    assert f'saved step {stopped["step"]} of 300; the same command goes on' in output
    output = finish(start(tmp_path, config))
    assert f'going on after step {stopped["step"]}' in output
    assert [record['step'] for record in of_kind(run, 'train')] == list(range(1, 301))
    assert 'is done after 300 steps' in finish(start(tmp_path, config))


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_all_end_when_one_dies_while_they_start(tmp_path, victim):
    """Before they have joined."""
    launcher = start(tmp_path, small_config(tmp_path))
    wait_until(launcher, lambda: len(children_of(launcher.pid)) == 2)
    children = children_of(launcher.pid)
    os.kill(children[victim], signal.SIGSEGV)
    assert f'process {victim} of 2 failed (killed by SIGSEGV)' in finish(launcher, code=1)
    assert all_end(children, 0)


@pytest.mark.slow
def test_all_end_when_the_launcher_dies(tmp_path):
    config = small_config(tmp_path, train__steps=3000, log__every=1)
    launcher = start(tmp_path, config)
    wait_until(launcher, lambda: len(of_kind(tmp_path / 'run', 'train')) > 5)
    children = children_of(launcher.pid)
    launcher.kill()
    assert all_end(children)
    assert last(read(tmp_path / 'run' / 'metrics.jsonl'), kind='run')['event'] == 'stopped'


@pytest.mark.slow
def test_what_the_run_refuses_is_said_once(tmp_path):
    """All processes find the same fault; the first says it, and its exit code is the launcher's."""
    output = finish(start(tmp_path, small_config(tmp_path), '--config.train.batch_size=7'), code=2)
    assert [line for line in output.splitlines() if 'error' in line] == [
        'error: mesh.data x mesh.fsdp x mesh.expert=2 must divide train.batch_size / train.accum_steps=7;'
        ' there are 2 devices; CUDA_VISIBLE_DEVICES, or mesh.cpu_devices on a CPU, leaves out some'
    ]


@pytest.mark.slow
def test_devices_of_each_process(tmp_path):
    config = small_config(tmp_path, train__steps=2)
    output = finish(start(tmp_path, config, '--devices-per-process', 2))
    assert 'devices   4 x cpu, data 4' in output


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_fault_of_ours_has_its_exit_code_and_its_traceback_is_kept(tmp_path, processes):
    experiment = tmp_path / 'experiment.py'
    experiment.write_text(FAULTY)
    options = ('--processes', processes, '--config', experiment, '--workdir', tmp_path / 'run')
    output = finish(launch('launch.local', *options, environment={'TMPDIR': str(tmp_path)}), code=70)
    assert "error: this is a fault of MixCon: KeyError: 'a key'; please report it" in output
    kept = next(tmp_path.glob('mixcon-fault-*'))
    assert str(kept) in output and "KeyError: 'a key'" in kept.read_text()


@pytest.mark.parametrize(
    'options, message',
    [
        (['--processes', '0'], '--processes 0 must be at least 1'),
        (['--timeout', '0'], '--timeout 0 must be at least 1'),
        (['--devices-per-process', '0'], '--devices-per-process 0 must be at least 1'),
        (['--stps=3'], 'unknown argument --stps=3; see `python -m launch.local --help`'),
        (['--config.modle.dim=3'], 'did you mean model.dim'),
        (['--config', 'nowhere.py'], 'nowhere.py does not exist'),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, options, message):
    experiment = write_experiment(tmp_path / 'experiment.py', small_config(tmp_path))
    with pytest.raises(SystemExit) as end:
        local.main(['--processes', '2', '--config', str(experiment), '--workdir', str(tmp_path / 'run'), *options])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error
