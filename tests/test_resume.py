"""A run killed by SIGKILL at any moment and started again ends like one never interrupted, bit for bit.

Real processes of the real command are killed: while they start, compile, train, evaluate and save.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mixcon_jax import config as configs
from mixcon_jax.runs.records import last, read
from tests.tiny import ROOT, outcome, start_training, tiny_config


def finish(config, workdir: Path, environment: dict[str, str] | None = None) -> str:
    """Runs to the end; returns what the process printed."""
    process = start_training(config, workdir, environment)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def kill_when(config, workdir: Path, moment) -> bool:
    """Starts the run and kills it as soon as ``moment(seconds since the start)``; False if it ended before."""
    process = start_training(config, workdir)
    begin = time.monotonic()
    while process.poll() is None and not moment(time.monotonic() - begin):
        assert time.monotonic() - begin < 600
        time.sleep(0.001)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode in (0, -9), output
    return process.returncode == -9


def lines_of(workdir: Path) -> int:
    path = workdir / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0


def event_steps(workdir: Path) -> list[int]:
    """Steps of the training loss in TensorBoard's files."""
    from tests.test_metrics import events

    return [step for tag, step, _ in events(workdir / 'tensorboard') if tag == 'train/loss']


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))


def assert_same_outcome(whole: Path, parts: Path, steps: int) -> None:
    expected, found = outcome(whole), outcome(parts)
    assert [r['step'] for r in found if r.get('kind') == 'train'] == list(range(1, steps + 1))
    assert found == expected
    assert event_steps(parts) == list(range(1, steps + 1))
    names = sorted(path.name for path in (parts / 'checkpoints').iterdir())
    assert names == sorted(path.name for path in (whole / 'checkpoints').iterdir())


def test_killed_at_random_moments_it_ends_bit_for_bit_alike(tmp_path):
    """Once at a random record, once while a checkpoint is being written, and once at any moment of its life."""
    seed = int.from_bytes(os.urandom(4), 'little')
    print(f'seed {seed}')  # shown when the test fails
    chance = random.Random(seed)
    steps = 24
    options = {'model__pattern': ('conba+moe',), 'model__conba__process_noise': 0.01}
    config = tiny_config(tmp_path, train__steps=steps, log__tensorboard=True, **options)
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    begin = time.monotonic()
    finish(config, whole)
    lifetime = time.monotonic() - begin
    count = chance.randrange(2, 20)
    assert kill_when(config, parts, lambda _: lines_of(parts) >= count)
    kill_when(config, parts, lambda _: saving(parts))
    moment = chance.uniform(0.3, 1.0) * lifetime
    kill_when(config, parts, lambda seconds: seconds > moment)
    finish(config, parts)
    assert_same_outcome(whole, parts, steps)
    # Once more: it is done, and says so without starting anything.
    begin = time.monotonic()
    assert 'is done after 24 steps' in finish(config, parts)
    assert time.monotonic() - begin < lifetime / 2


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 2])
def test_killed_many_times(tmp_path, devices):
    """Also with programs compiled anew in the uninterrupted run and read from the cache in the others."""
    seed = int.from_bytes(os.urandom(4), 'little')
    print(f'seed {seed}')
    chance = random.Random(seed)
    steps = 60
    config = tiny_config(
        tmp_path, train__steps=steps, log__tensorboard=True, mesh__cpu_devices=devices, eval__every=7,
        checkpoint__every=5, model__conba__observation_noise=0.01, model__moe__balance='bias', eval__max_rows=5,
    )  # fmt: skip
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    finish(config, whole, {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'empty')})
    for _ in range(10):
        ahead = chance.randrange(1, 25)
        base, delay = lines_of(parts), chance.uniform(0, 0.1)

        def moment(seconds: float, goal: int = base + ahead, delay: float = delay) -> bool:
            if lines_of(parts) >= goal:
                time.sleep(delay)
                return True
            return False

        if not kill_when(config, parts, moment):
            break
    finish(config, parts)
    assert_same_outcome(whole, parts, steps)


WORKER = """
    import sys
    import jax
    jax.distributed.initialize('127.0.0.1:{port}', 2, int(sys.argv[1]))
    from mixcon_jax import config
    from mixcon_jax.train import train
    print(train(config.read('{config}'), '{workdir}').exit_code)
"""


def run_pair(config, workdir: Path, while_running) -> list[str]:
    """Trains with two processes; returns what they printed."""
    path = workdir.parent / 'pair.json'
    path.write_text(configs.to_json(config))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    script = textwrap.dedent(WORKER.format(port=port, config=path, workdir=workdir))
    settings = os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
    command = [sys.executable, '-c', script]
    options = {'env': settings, 'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    pair = [subprocess.Popen([*command, str(i)], **options) for i in range(2)]
    try:
        while_running(pair)
        return [process.communicate(timeout=600)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_past_a_damaged_checkpoint(tmp_path):
    """SIGTERM to one of them; parameters are spread over both; one checkpoint is spoilt; one process goes on alone."""
    config = tiny_config(
        tmp_path, model__pattern=('attention+mlp',), train__steps=600, checkpoint__every=100, eval__every=300,
        mesh__fsdp=2, mesh__data=1, log__every=50,
    )  # fmt: skip
    workdir = tmp_path / 'pair'

    def stop_one(pair) -> None:
        while not (workdir / 'checkpoints' / '100').exists():
            assert all(process.poll() is None for process in pair), [process.communicate()[0] for process in pair]
            time.sleep(0.05)
        pair[1].send_signal(signal.SIGTERM)

    outputs = run_pair(config, workdir, stop_one)
    assert [output.splitlines()[-1] for output in outputs] == ['75', '75'], outputs
    stopped = last(read(workdir / 'metrics.jsonl'), kind='run')
    assert stopped['event'] == 'stopped' and (workdir / 'checkpoints' / str(stopped['step'])).is_dir()
    (workdir / 'checkpoints' / str(stopped['step']) / 'meta' / 'metadata').write_text('{')
    configs.put(config, 'mesh.fsdp', 1)
    output = finish(config, workdir)
    assert f'checkpoint {stopped["step"]} is damaged' in output
    steps = [record['step'] for record in read(workdir / 'metrics.jsonl') if record['kind'] == 'train']
    assert steps == [1, *range(50, 601, 50)]
