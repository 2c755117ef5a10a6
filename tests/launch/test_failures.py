"""Processes that share the parts of one row die, hang or are told to stop: all end in time, and nothing is lost."""

import os
import random
import signal
import socket
import time

import pytest

from launch import cluster, member
from launch.member import HEARTBEAT
from mixcon_jax.errors import UserError
from mixcon_jax.runs.records import last, read
from tests.launch.launching import all_end, children_of, finish, launch, small_config, wait_until
from tests.tiny import outcome, write_experiment

ACROSS = {'mesh__data': 1, 'mesh__tensor': 4, 'model__attention__num_heads': 4, 'model__attention__num_kv_heads': 4}
HANG = 6  # seconds of --heartbeat where a process is to hang

# Appended to an experiment file: with PAUSE in the environment, restoring takes long and says when it is half done.
SLOW_RESTORE = """

import os, sys, time

if os.environ.get('PAUSE') and '--rank' in sys.argv:
    from mixcon_jax.runs.checkpoints import Checkpoints

    arrays = Checkpoints._arrays

    def slowly(self, step, item, wanted):
        restored = arrays(self, step, item, wanted)
        open(os.environ['PAUSE'], 'w').close()
        time.sleep(5)
        return restored

    Checkpoints._arrays = slowly
"""


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f':{port} cannot be listened on here .* is its port taken'):
            member.join(5, 5, coordinator_address=f'127.0.0.1:{port}', num_processes=1, process_id=0)


def records_of(run, kind: str) -> list:
    return [record for record in read(run / 'metrics.jsonl') if record['kind'] == kind]


@pytest.mark.slow
def test_whatever_befalls_one_process_the_run_ends_as_an_uninterrupted_one(tmp_path):
    """Two processes of two devices each, with an axis across them; one after the other, on one run: SIGKILL at a random
    step, at a save and during restore, SIGTERM at one, and one that is stopped and hangs. Then bit for bit the same."""
    seed = int.from_bytes(os.urandom(4), 'little')
    print(f'seed {seed}')  # shown when the test fails
    chance = random.Random(seed)
    config = small_config(tmp_path, train__steps=90, checkpoint__every=6, eval__every=30, log__every=1, **ACROSS)
    experiment = write_experiment(tmp_path / 'experiment.py', config)
    experiment.write_text(experiment.read_text() + SLOW_RESTORE)
    whole, parts, pause = tmp_path / 'whole', tmp_path / 'parts', tmp_path / 'restoring'

    def start(workdir, **environment: str):
        options = ('--processes', 2, '--devices-per-process', 2, '--config', experiment, '--workdir', workdir)
        return launch('launch.local', *options, '--heartbeat', HANG, environment=environment)

    def interrupt(number: int, moment, code: int, within: float, **environment: str) -> tuple[str, int]:
        """Sends a signal to one of the processes at a moment; returns what was printed and which it was."""
        launcher = start(parts, **environment)
        wait_until(launcher, moment)
        children, victim = children_of(launcher.pid), chance.randrange(2)
        os.kill(children[victim], number)
        begin = time.monotonic()
        output = finish(launcher, code=code, seconds=within)
        print(f'{signal.Signals(number).name} at {victim}: {time.monotonic() - begin:.1f} s')
        assert all_end(children, 0)
        return output, victim

    def steps() -> int:
        return len(records_of(parts, 'train'))

    def named(victim: int, how: str) -> str:
        return f'error: process {victim} of 2 {how}'

    finish(start(whole))
    count = chance.randrange(7, 20)
    output, victim = interrupt(signal.SIGKILL, lambda: steps() >= count, 1, 30)
    assert named(victim, 'failed (killed by SIGKILL') in output

    saving = lambda: steps() > count and any((parts / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))
    output, victim = interrupt(signal.SIGKILL, saving, 1, 30)
    assert named(victim, 'failed (killed by SIGKILL') in output

    output, victim = interrupt(signal.SIGKILL, pause.exists, 1, 30, PAUSE=str(pause))
    assert named(victim, 'failed (killed by SIGKILL') in output and 'going on after' not in output

    before = steps()
    output, victim = interrupt(signal.SIGTERM, lambda: steps() > before + 3, 75, 60)
    stopped = last(read(parts / 'metrics.jsonl'), kind='run')
    assert stopped['event'] == 'stopped' and (parts / 'checkpoints' / str(stopped['step'])).is_dir()

    output, victim = interrupt(signal.SIGSTOP, lambda: steps() > stopped['step'] + 3, 1, HANG + 20)
    assert named(victim, 'hung, without a sign of life for') in output

    finish(start(parts))
    assert outcome(parts) == outcome(whole)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def by_address(folder, config, *options: object) -> list:
    """Two processes that are told where the first is."""
    experiment, port = write_experiment(folder / 'experiment.py', config), free_port()
    arguments = ('--config', experiment, '--workdir', folder / 'run', '--coordinator', f'127.0.0.1:{port}', *options)
    return [launch('launch.cluster', *arguments, '--processes', 2, '--rank', rank) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize('number, heartbeat', [(signal.SIGKILL, HEARTBEAT), (signal.SIGSTOP, HANG)])
def test_without_a_launcher_the_others_end_by_themselves(tmp_path, number, heartbeat):
    """As under a scheduler: 30 seconds after a death at the latest, and soon after the heartbeat when one hangs."""
    config = small_config(tmp_path, train__steps=3000, log__every=1)
    pair = by_address(tmp_path, config, '--heartbeat', heartbeat)
    wait_until(pair[0], lambda: len(records_of(tmp_path / 'run', 'train')) > 5)
    pair[1].send_signal(number)
    begin = time.monotonic()
    output, _ = pair[0].communicate(timeout=heartbeat + 20)
    pair[1].kill()
    assert time.monotonic() - begin < (30 if number == signal.SIGKILL else heartbeat + 10)
    assert pair[0].returncode in (1, -signal.SIGABRT), output
    assert 'another process of this run cannot be reached' in output or 'another task died' in output


@pytest.mark.slow
def test_a_schedulers_environment_says_who_is_who_and_one_that_is_told_to_stop_stops_all(tmp_path):
    config = small_config(tmp_path, train__steps=3000, log__every=1)
    experiment, job = write_experiment(tmp_path / 'experiment.py', config), os.getpid()
    slurm = {'SLURM_JOB_ID': str(job), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
    pair = [
        launch(
            'launch.cluster', '--config', experiment, '--workdir', tmp_path / 'run',
            environment=slurm | {'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    wait_until(pair[0], lambda: len(records_of(tmp_path / 'run', 'train')) > 5)
    pair[1].send_signal(signal.SIGTERM)
    output = finish(pair[0], code=75)
    finish(pair[1], code=75)
    stopped = last(read(tmp_path / 'run' / 'metrics.jsonl'), kind='run')
    assert f'saved step {stopped["step"]} of 3000' in output


def test_one_that_waits_in_vain_ends_in_time(tmp_path):
    experiment = write_experiment(tmp_path / 'experiment.py', small_config(tmp_path))
    options = ('--coordinator', f'127.0.0.1:{free_port()}', '--processes', 2, '--rank', 0, '--timeout', 1)
    output = finish(launch('launch.cluster', '--config', experiment, '--workdir', tmp_path / 'run', *options), code=1)
    assert output.splitlines()[-1].startswith('error: the processes of this run have not come together within 1 s')
    assert not (tmp_path / 'run').exists()


def test_without_a_scheduler_it_says_what_to_give(tmp_path):
    experiment = write_experiment(tmp_path / 'experiment.py', small_config(tmp_path))
    output = finish(launch('launch.cluster', '--config', experiment, '--workdir', tmp_path / 'run'), code=2)
    assert output.splitlines()[-1].startswith('error: no scheduler that JAX knows has started this process')


@pytest.mark.parametrize(
    'options, message',
    [
        (('--processes', '2'), '--coordinator, --rank is missing; give all of'),
        (('--coordinator', 'here', '--processes', '2', '--rank', '0'), '--coordinator here must be HOST:PORT'),
        (('--coordinator', 'a:1', '--processes', '2', '--rank', '2'), '--rank 2 must be at least 0 and below'),
        (('--heartbeat', '0'), '--heartbeat 0 must be at least 1'),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, options, message):
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, '_exit', leave)
    experiment = write_experiment(tmp_path / 'experiment.py', small_config(tmp_path))
    with pytest.raises(SystemExit) as end:
        cluster.main(['--config', str(experiment), '--workdir', str(tmp_path / 'run'), *options])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error
