"""Starting launchers as a person would, and looking for what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.tiny import ROOT, tiny_config, write_experiment


def small_config(folder: Path, **overrides):
    """The smallest model that trains: one attention layer, evaluated at the end alone."""
    options = {'model__pattern': ('attention+mlp',), 'eval__every': 0, 'checkpoint__every': 1000}
    return tiny_config(folder, **(options | overrides))


def write_sweep(path: Path, config, sweep: str) -> Path:
    """An experiment file of this configuration with this source of sweep(); both take an argument."""
    text = write_experiment(path, config).read_text().replace('get_config()', 'get_config(arg=None)')
    path.write_text(f'{text}\n\n{sweep}')
    return path


def launch(
    module: str, *arguments: object, environment: Mapping[str, str] | None = None, stderr: int = subprocess.STDOUT
) -> subprocess.Popen:
    """Starts ``python -m module`` with one CPU device a process; both streams come as one text pipe, unless told."""
    flags = [flag for flag in os.environ.get('XLA_FLAGS', '').split() if 'device_count' not in flag]
    settings = os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ' '.join(flags), 'PYTHONUNBUFFERED': ''}
    settings |= environment or {}
    command = [sys.executable, '-m', module, *map(str, arguments)]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=stderr, text=True)


def finish(launcher: subprocess.Popen, code: int = 0, seconds: float = 300) -> str:
    """Waits for it, no longer than this; returns what it and the first of its children printed."""
    try:
        output, _ = launcher.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        all_end([*children_of(launcher.pid), launcher.pid], 0)
        raise
    assert launcher.returncode == code, output
    return output


def wait_until(launcher: subprocess.Popen, moment: Callable[[], bool]) -> None:
    """Returns when ``moment()`` comes, which must be before the launcher ends."""
    begin = time.monotonic()
    while not moment():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() - begin < 300
        time.sleep(0.01)


def children_of(process: int) -> list[int]:
    """Processes that it has started and that run."""
    return [int(child) for child in Path(f'/proc/{process}/task/{process}/children').read_text().split()]


def running(process: int) -> bool:
    """Whether it runs; one that has ended and whose end nobody has noted does not."""
    try:
        state = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0]
    except OSError:
        return False
    return state not in 'ZX'


def all_end(processes: list[int], seconds: float = 120) -> bool:
    """Whether all end in time; those that do not are killed."""
    deadline = time.monotonic() + seconds
    while any(map(running, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [process for process in processes if running(process)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    return not left
