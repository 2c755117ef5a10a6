"""What the launchers share: children that end with their launcher, their shares of the machine, and stopping them."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mixcon_jax.errors import UserError
from mixcon_jax.host.signals import Handler, end_with

LAUNCHER = 'MIXCON_LAUNCHER'  # the environment variable in which a child finds its launcher's process id
GRACE = 10.0  # seconds between SIGTERM and SIGKILL for children that nothing is left to wait for
JAX_FRAMES = 'For simplicity, JAX has removed its internal frames'
POLL = 0.1  # seconds between looks at the children

Child = subprocess.Popen[bytes]


# ----- shares of the machine ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Share:
    """What one child may use.

    Attributes:
      cores: numbers of CPU cores; empty leaves the choice to the system.
      gpus: entries of CUDA_VISIBLE_DEVICES, or None to leave that variable as it is.
    """

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] | None = None


def shares(count: int, option: str, environment: Mapping[str, str], overlap: bool = False) -> list[Share]:
    """Equal shares of this machine's cores and visible GPUs for ``count`` children.

    What does not divide stays unused: with unequal shares a run's speed, and the order in which its threads add
    numbers, would depend on the place it got.

    Args:
      option: what asked for so many, such as ``--jobs``.
      environment: the children's.
      overlap: whether they may share cores, as children do well that wait for one another: with one core each, a
        child's step waits whenever its messages are handled. Then cores are shared out only from two for each on.

    Raises:
      UserError: there are fewer cores or GPUs than children.
    """
    if count < 1:
        raise UserError(f'{option} {count} must be at least 1')
    if count == 1:
        return [Share()]
    cores, gpus = _cores(), visible_gpus(environment)
    if overlap and len(cores) < 2 * count:
        cores = ()
    if cores and len(cores) < count:
        raise UserError(f'{option} {count} needs as many CPU cores, but there are {len(cores)}; use fewer')
    if gpus and len(gpus) < count:
        raise UserError(
            f'{option} {count} needs as many GPUs, but {len(gpus)} {"is" if len(gpus) == 1 else "are"} visible;'
            ' use fewer, or JAX_PLATFORMS=cpu to train on CPU cores'
        )
    return [Share(_part(cores, i, count), _part(gpus, i, count) if gpus else None) for i in range(count)]


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES lists or, where it is not set, those of the driver; none if JAX takes none."""
    platforms = environment.get('JAX_PLATFORMS', '')
    if platforms and not {'cuda', 'gpu'} & set(platforms.split(',')):
        return ()
    listed = environment.get('CUDA_VISIBLE_DEVICES')
    if listed is None:
        return tuple(str(number) for number, _ in enumerate(Path('/proc/driver/nvidia/gpus').glob('*')))
    gpus: list[str] = []
    for entry in listed.split(','):
        if entry.strip() in ('', '-1'):  # as CUDA reads it: what follows is hidden
            break
        gpus.append(entry.strip())
    return tuple(gpus)


def _cores() -> tuple[int, ...]:
    """The cores that this process may use; none where the system cannot tell."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, 'sched_getaffinity') else ()


def _part(items: Sequence[Any], index: int, count: int) -> tuple[Any, ...]:
    size = len(items) // count
    return tuple(items[index * size : (index + 1) * size])


# ----- children -----------------------------------------------------------------------------------------------------


def start(
    module: str, arguments: Sequence[str], share: Share, environment: Mapping[str, str], output: IO[bytes] | int | None
) -> Child:
    """Starts ``python -m module``, which should call ``end_with_launcher`` before anything else.

    It leads a session of its own, so that Ctrl-C in the terminal reaches the launcher alone.

    Args:
      share: of the machine.
      environment: the child's, but for what the share sets.
      output: where both its streams go; None leaves them as the launcher's.
    """
    settings = {**environment, LAUNCHER: str(os.getpid()), 'PYTHONUNBUFFERED': '1'}
    if share.gpus is not None:
        settings['CUDA_VISIBLE_DEVICES'] = ','.join(share.gpus)
    with _confined(share.cores):
        return subprocess.Popen(
            [sys.executable, '-m', module, *arguments], env=settings, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT if output is not None else None, start_new_session=True,
        )  # fmt: skip


@contextlib.contextmanager
def _confined(cores: Sequence[int]) -> Iterator[None]:
    """Confines this thread, and the children it starts meanwhile, to these cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def end_with_launcher() -> None:
    """In a child of a launcher: it ends when the launcher does, as ``end_with`` has it."""
    launcher = int(os.environ.pop(LAUNCHER, '0'))
    if launcher:
        end_with(launcher)


def end(children: Sequence[Child], grace: float = GRACE) -> None:
    """Returns when all have ended: by SIGTERM or, after ``grace`` seconds, by SIGKILL, with all of their session."""
    for child in children:
        child.terminate()
    wait(children, grace)
    kill(children)


def wait(children: Sequence[Child], seconds: float = GRACE) -> None:
    """Returns when all have ended or the time is over."""
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(POLL)


def kill(children: Sequence[Child]) -> None:
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f'exit code {code}'
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f'signal {-code}'
    return f'killed by {name}' + (', perhaps for want of memory' if -code == signal.SIGKILL else '')


def last_lines(path: Path, number: int, begin: int = 0) -> list[str]:
    """The last lines of a file that say something, of what lies after byte ``begin``.

    Blank lines do not, nor do a traceback's frames in libraries and JAX's words on frames that it has left out.
    """
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - 64 * 1024))
        lines = file.read().decode(errors='replace').splitlines()
    kept, in_library = [], False
    for line in lines:
        if line.startswith('  File "'):
            in_library = '/site-packages/' in line
        elif not line.startswith('    '):
            in_library = False
        if line.strip(' -') and not in_library and not line.startswith(JAX_FRAMES):
            kept.append(line.rstrip())
    return kept[-number:]


class Signals(Handler):
    """While active, the signals of ``host.signals.STOPPING`` end nothing but are noted here.

    Attributes:
      stop: one came.
      kill: after it, Ctrl-C came once more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stop = self.kill = False

    def handle(self, number: int) -> None:
        self.kill |= self.stop and number == signal.SIGINT
        self.stop = True
