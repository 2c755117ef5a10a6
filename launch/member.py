"""One of the processes of a command: it joins the others in time, runs it, and ends soon after one of them is gone.

Whoever starts it, ``launch.local`` on this machine or a scheduler on many (``launch.cluster``), the processes find one
another through ``jax.distributed`` and send the first one heartbeats. One that sends none, because it died, its machine
did or it was stopped, ends all the others.
"""

import argparse
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mixcon_jax import cli
from mixcon_jax.config import load, mesh_of
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host import stuck
from mixcon_jax.host.ending import failed, prepare
from mixcon_jax.host.output import OutputLost, go_on, guarded, keep_libraries_out
from mixcon_jax.runs.workdir import report_if_finished

COMMANDS = ('train', 'eval', 'generate')
HEARTBEAT = 25  # seconds: with what noticing and ending takes, a dead process ends the job within 30
MARGIN = 60  # seconds that JAX would wait longer than we do
PATIENCE = 1800  # seconds, as a disk or a network may be slow


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
    parser.add_argument(
        '--patience', type=int, default=PATIENCE, metavar='SECONDS',
        help='after which one that is stuck reading a batch, or writing a record, ends the job'
        f' (default: {PATIENCE})',
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


def command_of(argv: Sequence[str], program: str) -> tuple[str, list[str]]:
    """Which command of ``mixcon`` the processes are to run, ``train`` unless the first argument says it, and the rest.

    Raises:
      UserError: it is one for a single process.
    """
    if not argv or argv[0].startswith('-'):
        return COMMANDS[0], list(argv)
    if argv[0] not in COMMANDS:
        raise UserError(f'{argv[0]} is no command of {program}, which runs {", ".join(COMMANDS)}')
    return argv[0], list(argv[1:])


def asked(command: str, rest: Sequence[str], program: str) -> tuple[argparse.Namespace, list[str]]:
    """What a command of ``mixcon`` is asked for, as it reads its arguments itself, and the overrides among them.

    Raises:
      UserError: an argument is unknown, or a number too large.
    """
    known, rest = cli.build_parser(program).parse_known_args([command, *rest])
    overrides = cli.parse_overrides(rest, program)
    cli.require_numbers(known)
    return known, overrides


def prepared(command: str, known: argparse.Namespace, overrides: list[str]) -> Callable[[], int] | None:
    """What one of the processes does once it has joined the others, where only the first prints results.

    Returns:
      None if it is to train a run that is done, which it says.

    Raises:
      UserError: the configuration to train by cannot be read, or a mesh.
    """
    if command == 'train':
        config = load(known.config, overrides)
        if report_if_finished(config, known.workdir):
            return None

        def train() -> int:
            from mixcon_jax.train import train

            return train(config, known.workdir).exit_code

        return train

    devices = mesh_of(overrides).cpu_devices
    os.environ['JAX_ENABLE_PREEMPTION_SERVICE'] = 'false'  # it takes SIGTERM, and training alone asks what came

    def run() -> int:
        import jax

        from mixcon_jax.host.compilation import make_cpu_devices

        make_cpu_devices(devices)  # before JAX starts them, to say which process this is
        with contextlib.ExitStack() as stack:
            if jax.process_index() > 0:
                nowhere = stack.enter_context(open(os.devnull, 'w', encoding='utf-8'))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            return known.run(known, overrides)

    return run


def be(run: Callable[[], int]) -> NoReturn:
    """Calls ``run`` as one of the processes, and exits with the code that it returns or what its error means."""
    keep_libraries_out()
    with guarded():
        prepare()
        go_on()
        try:
            code = run()
        except (Exception, KeyboardInterrupt, OutputLost) as error:
            _leave(failed(error))
    sys.exit(code)


def join(timeout: int, heartbeat: int, **where: Any) -> None:
    """Returns when all processes have come together; if they do not in time, says so and ends this one.

    Args:
      timeout: seconds within which they must.
      heartbeat: seconds after which one that gives no sign of life is taken for dead: then all others end.
      where: of ``jax.distributed.initialize``; without, a scheduler's environment says it.
    """
    if where.get('process_id') == 0:
        port = where['coordinator_address'].rpartition(':')[2]
        _require_free(where.get('coordinator_bind_address') or f':{port}')
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


def _require_free(address: str) -> None:
    """Refuses an address on which another program listens: JAX may crash there.

    Raises:
      UserError: names it.
    """
    host, _, port = address.rpartition(':')
    try:
        family, kind, *_, place = socket.getaddrinfo(
            host.strip('[]') or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed just now is free
            probe.bind(place)
    except (OSError, OverflowError) as error:
        raise UserError(f'{address} cannot be listened on here ({error}); is its port taken?') from error


def watch(patience: float, mark: Path | None = None) -> None:
    """Ends this process where it gets stuck in work of its own, and touches a file every second until then.

    Args:
      patience: seconds that a process may take to read a batch, or to write a record.
      mark: the file. It is not touched by a process that is stopped, or holds Python's lock.
    """

    def name() -> str:
        import jax

        return f'process {jax.process_index()} of {jax.process_count()}'

    stuck.watch(patience, name, Exit.FAILED, mark.touch if mark else None)


def _leave(code: int) -> NoReturn:
    """Exits at once: at a normal exit JAX waits for processes that may be waiting for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
