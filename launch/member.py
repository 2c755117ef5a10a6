"""One of the processes of a training: it joins the others in time, trains, and ends soon after one of them is gone.

Whoever starts it, ``launch.local`` on this machine or a scheduler on many (``launch.cluster``), the processes find one
another through ``jax.distributed`` and send the first one heartbeats. One that sends none, because it died, its machine
did or it was stopped, ends all the others.
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host.ending import failed, prepare
from mixcon_jax.host.output import go_on, guarded

HEARTBEAT = 25  # seconds: with what noticing and ending takes, a dead process ends the job within 30
MARGIN = 60  # seconds that JAX would wait longer than we do
PULSE = 1.0  # seconds between two signs of life


def add_arguments(parser: argparse.ArgumentParser, timeout: int) -> None:
    """The options of how long to wait for others."""
    parser.add_argument(
        '--timeout', type=int, default=timeout, metavar='SECONDS',
        help=f'within which all must have joined (default: {timeout})',
    )  # fmt: skip
    parser.add_argument(
        '--heartbeat', type=int, default=HEARTBEAT, metavar='SECONDS',
        help=f'after which a process that gives no sign of life ends the job (default: {HEARTBEAT})',
    )  # fmt: skip


def require_positive(known: argparse.Namespace, *options: str) -> None:
    """Refuses an option that is given and below 1.

    Raises:
      UserError: names it.
    """
    for option in options:
        value = getattr(known, option.removeprefix('--').replace('-', '_'))
        if value is not None and value < 1:
            raise UserError(f'{option} {value} must be at least 1')


def be(train: Callable[[], int]) -> NoReturn:
    """Runs ``train`` as one of the processes, and exits with the code that it returns or what its error means."""
    with guarded():
        prepare()
        go_on()
        try:
            code = train()
        except Exception as error:
            _leave(failed(error))
    sys.exit(code)


def join(timeout: int, heartbeat: int, **where: Any) -> None:
    """Returns when all processes have come together; if they do not in time, says so and ends this one.

    Args:
      timeout: seconds within which they must.
      heartbeat: seconds after which one that gives no sign of life is taken for dead: then all others end.
      where: of ``jax.distributed.initialize``; without, a scheduler's environment says it.
    """
    import jax  # takes seconds

    def give_up() -> None:
        print(
            f'error: the processes of this run have not come together within {timeout} s; have all been started, and'
            ' can they reach the machine of process 0? --timeout sets how long to wait',
            file=sys.stderr,
        )
        _leave(Exit.FAILED)

    # JAX's own end of waiting is an abort, by a call that no exception leaves.
    waiting = threading.Timer(timeout, give_up)
    waiting.daemon = True
    waiting.start()
    jax.distributed.initialize(
        **where,
        initialization_timeout=timeout + MARGIN,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=timeout,
    )
    waiting.cancel()


def keep_giving_signs(mark: Path) -> None:
    """Touches a file every second, from a thread: none comes of a process that is stopped, or holds Python's lock."""

    def beat() -> None:
        while True:
            try:
                mark.touch()
            except OSError:  # the launcher has gone, and its folder
                return
            ended.wait(PULSE)

    ended = threading.Event()
    threading.Thread(target=beat, daemon=True).start()


def _leave(code: int) -> NoReturn:
    """Exits at once: at a normal exit JAX waits for processes that may be waiting for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
