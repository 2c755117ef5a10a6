"""The `mixcon` command itself on the GPU: a run that is stopped and goes on, and the quickstart end to end."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from mixcon_jax.runs.records import last, read
from tests.tiny import ROOT, outcome, start_training, tiny_config

Say = Callable[[dict[str, Any]], None]


def resume(folder: pathlib.Path, say: Say, steps: int, stop_after: int, **options: Any) -> None:
    """A run that SIGTERM stops and the same command continues must end like one that nobody stopped, bit for bit."""
    options |= {'train__steps': steps, 'eval__every': 0, 'checkpoint__every': steps, 'log__every': 1}
    config = tiny_config(folder, **options)
    whole, parts = folder / 'whole', folder / 'parts'
    codes = {}
    for name, workdir in (('whole', whole), ('stopped', parts), ('going on', parts)):
        # One after the other: XLA times its choices on a GPU, and keeps them for the next start.
        process = start_training(config, workdir)
        while name == 'stopped' and process.poll() is None and trained(workdir) < stop_after:
            time.sleep(0.005)
        if name == 'stopped':
            process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate()
        codes[name] = process.returncode
    found: dict[str, Any] = {'exit_codes': codes}
    if codes != {'whole': 0, 'stopped': 75, 'going on': 0}:
        found['failed'] = f'exit codes {codes}: {printed[-600:]}'
    elif outcome(whole) != outcome(parts):
        prints = [last(read(path / 'metrics.jsonl'), kind='run')['fingerprint'] for path in (whole, parts)]
        differ = [a.get('step') for a, b in zip(outcome(whole), outcome(parts)) if a != b]
        found['failed'] = f'not the same bits: {prints}, records differ from step {differ[:1]} on'
    say(found)


def trained(workdir: pathlib.Path) -> int:
    """Steps that a run has recorded."""
    return sum(record['kind'] == 'train' for record in read(workdir / 'metrics.jsonl'))


def quickstart(folder: pathlib.Path, say: Say, overrides: list[str]) -> None:
    """`mixcon train` of experiments/quickstart.py, then `mixcon eval` and `mixcon generate`."""
    workdir = str(folder / 'quickstart')
    cache = f'--config.data.cache_dir={folder / "cache"}'
    commands = {
        'train': ['--config', str(ROOT / 'experiments' / 'quickstart.py'), cache, *overrides],
        'eval': [],
        'generate': ['--prompt', 'def __init__(self', '--max-new-tokens', '32'],
    }
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    for name, arguments in commands.items():
        start = time.monotonic()
        command = [sys.executable, '-m', 'mixcon_jax.cli', name, '--workdir', workdir, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        found: dict[str, Any] = {'command': name, 'seconds': round(time.monotonic() - start, 1)}
        found['printed'] = done.stdout.strip().splitlines()[-6:]
        if done.returncode or not done.stdout.strip():
            found['failed'] = f'mixcon {name} exits with {done.returncode}: {(done.stderr or done.stdout)[-600:]}'
        say(found)
        if 'failed' in found:
            return
    record = last(read(folder / 'quickstart' / 'metrics.jsonl'), kind='run')
    say({'bits_per_byte': record.get('bits_per_byte'), 'loss': record.get('loss')})
