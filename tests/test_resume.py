"""A run killed by SIGKILL at any moment and started again ends like one never interrupted, bit for bit.

Real processes of the real command are killed: while they start, compile, train, evaluate and save.
"""

import os
import random
import time
from pathlib import Path

import pytest

from mixcon_jax.records import Record, last, read
from tests.tiny import start_training, tiny_config

TIMELESS = ('time', 'goodput', 'time_shares', 'tokens_per_second', 'flops_per_second', 'mfu')


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


def outcome(workdir: Path) -> list[Record]:
    """Everything a run's metrics say that is no time: each record once, in order, and the parameters' hash."""
    records = read(workdir / 'metrics.jsonl')
    kept = [r for r in records if r['kind'] in ('train', 'eval', 'final')]
    done = last(records, kind='run')
    assert done is not None and done['event'] == 'done'
    kept = [{key: value for key, value in r.items() if key not in TIMELESS} for r in kept]
    return [*kept, {'fingerprint': done['fingerprint']}]


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
    config = tiny_config(tmp_path, train__steps=steps, log__tensorboard=True, model__conba__process_noise=0.01)
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
