"""One training over several processes of this machine, as over several machines; or one evaluation, or generation.

    python -m launch.local --processes 2 --config experiments/quickstart.py --workdir runs/quickstart
    python -m launch.local eval --processes 2 --workdir runs/quickstart

takes what ``mixcon train`` takes, ``mixcon eval`` or ``mixcon generate``. The processes find one another through
``jax.distributed`` and share cores and GPUs out among them. What the first prints is shown; of another, the end of its
output when it fails.
"""

import argparse
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import member, processes
from launch.processes import Child, Signals
from mixcon_jax.cli import OVERRIDES, LineParser, require_numbers
from mixcon_jax.config import load, mesh_of
from mixcon_jax.errors import Exit
from mixcon_jax.host import stuck
from mixcon_jax.host.ending import exit_with
from mixcon_jax.host.output import go_on, use_utf8
from mixcon_jax.host.signals import STOPPING
from mixcon_jax.runs.workdir import report_if_finished

PROGRAM = 'python -m launch.local'
DESCRIPTION = (
    'Train over several processes of this machine, which share its cores and GPUs; on CPU each has one XLA device.'
    ' The same command goes on. With eval or generate as the first argument, do that. All else is as of `mixcon`.'
)
EPILOG = (
    f'{OVERRIDES} When one process dies or is stopped all others are stopped, and the end of its output is shown.'
    f' Exit codes: those of `mixcon train`, {Exit.FAILED} when a process died and {Exit.INTERRUPTED} when a second'
    ' Ctrl-C killed them.'
)
ALIVE = 'alive'  # the mark whose time is that of a process's last sign of life
ORDERLY = (Exit.USER_ERROR, Exit.ABORTED)  # exit codes of a run that has said itself why it ends


def main(argv: Sequence[str] | None = None) -> None:
    """Launches the processes, or is one of them."""
    if argv is None:
        use_utf8()
    argv = sys.argv[1:] if argv is None else argv
    if '--rank' not in argv:
        exit_with(lambda: _launch(argv))
    else:
        processes.end_with_launcher()
        member.be(lambda: _take_part(argv))


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(PROGRAM, description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument('--processes', type=int, required=True, metavar='N', help='how many processes')
    parser.add_argument(
        '--devices-per-process', type=int, metavar='D',
        help='on CPU, XLA devices of each (default: mesh.cpu_devices, or 1)',
    )  # fmt: skip
    member.add_arguments(parser, timeout=60)
    parser.add_argument('--rank', type=int, help=argparse.SUPPRESS)  # one of the processes is meant
    parser.add_argument('--coordinator', help=argparse.SUPPRESS)  # address of the first
    parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)  # where it tells that it has joined
    return parser


# ----- the launcher -------------------------------------------------------------------------------------------------


def _launch(argv: Sequence[str]) -> int:
    command, argv = member.command_of(argv, PROGRAM)
    known, rest = build_parser().parse_known_args(argv)
    asked, overrides = member.asked(command, rest, PROGRAM)
    require_numbers(known)
    go_on()
    member.require_positive(known, '--devices-per-process', '--timeout', '--heartbeat', '--patience')
    shares = processes.shares(known.processes, '--processes', os.environ, overlap=True)
    if command == 'train':
        config = load(asked.config, overrides)
        if report_if_finished(config, asked.workdir):
            return Exit.DONE
        mesh = config.mesh
    else:
        mesh = mesh_of(overrides)
    devices = known.devices_per_process or mesh.cpu_devices or 1
    folder = Path(tempfile.mkdtemp(prefix='mixcon-local-'))
    own = ['--devices-per-process', str(devices), '--coordinator', f'127.0.0.1:{_free_port()}', '--folder', str(folder)]
    children: list[Child] = []
    try:
        with Signals() as signals:
            for rank, share in enumerate(shares):
                options = [command, *own, '--rank', str(rank), *argv]  # what follows a -- are files
                if rank == 0:
                    children.append(processes.start('launch.local', options, share, os.environ, None))
                    continue
                with open(_output(folder, rank), 'wb') as file:
                    children.append(processes.start('launch.local', options, share, os.environ, file))
            return _watch(children, folder, known, signals, resumable=command == 'train')
    finally:
        processes.kill(children)
        shutil.rmtree(folder, ignore_errors=True)


def _watch(
    children: Sequence[Child], folder: Path, known: argparse.Namespace, signals: Signals, resumable: bool
) -> int:
    """Waits for all to end, and sees to it that they do; returns the launcher's exit code.

    What is told to stop and is resumable finishes its step; else there is nothing to go on with.
    """
    begin, stopping, together = time.monotonic(), False, False
    while True:
        codes = [child.poll() for child in children]
        if all(code in (Exit.DONE, Exit.STOPPED) for code in codes):
            return max(code for code in codes if code is not None)
        if signals.kill or (signals.stop and not resumable):
            processes.kill(children)
            return Exit.INTERRUPTED
        if signals.stop and not stopping:
            stopping = True
            _say('stopping: all finish the same step and save; Ctrl-C again kills')
            for child in children:
                child.terminate()
        failed = [rank for rank, code in enumerate(codes) if code not in (None, Exit.DONE, Exit.STOPPED)]
        if failed and (silent := _silent(children, failed, folder, known.heartbeat)):
            return _end_silent(children, silent, folder)
        if failed:
            return _give_up(children, failed, folder, stopping)
        together = together or all(_mark(folder, 'joined', rank).exists() for rank in range(len(children)))
        if not together and time.monotonic() - begin > known.timeout:
            return _nobody_came(children, folder, known.timeout)
        time.sleep(processes.POLL)


def _give_up(children: Sequence[Child], failed: Sequence[int], folder: Path, stopping: bool) -> int:
    """Stops all because some have failed; says which and why."""
    codes = {rank: children[rank].returncode for rank in failed}
    # Who is missed by others brings them down: by JAX, which aborts, or by an error of theirs. So what a signal killed
    # comes first, but all that failed are shown.
    codes = dict(sorted(codes.items(), key=lambda item: item[1] >= 0 or -item[1] == signal.SIGABRT))
    if set(codes.values()) <= set(ORDERLY):  # then all end so, and the first has shown why
        processes.wait(children[:1])
        if children[0].returncode in ORDERLY:
            processes.end(children)
            return children[0].returncode
    processes.end(children)
    if stopping and any(-code in STOPPING for code in codes.values()):
        _say('stopped before the processes had joined; the same command starts again')
        return Exit.STOPPED
    for rank, code in codes.items():
        _say(f'error: process {rank} of {len(children)} failed ({processes.how_it_ended(code)}); all were stopped')
        _show_output(rank, folder)
    first = next(iter(codes.values()))  # what killed that one may be what the others raised an exception for
    faulty = Exit.FAULT in codes.values() and (first >= 0 or -first == signal.SIGABRT)
    return next((code for code in codes.values() if code in ORDERLY), Exit.FAULT if faulty else Exit.FAILED)


def _silent(children: Sequence[Child], failed: Sequence[int], folder: Path, heartbeat: float) -> dict[int, float]:
    """Processes that run but hang, with the seconds since their last sign of life.

    None unless the others have ended because they missed one: each is told of it by JAX, which aborts it.
    """
    if not {children[rank].returncode for rank in failed} <= {-signal.SIGABRT, Exit.FAILED}:
        return {}
    since = {}
    for rank in range(len(children)):
        if children[rank].poll() is None and (mark := _mark(folder, ALIVE, rank)).exists():
            since[rank] = time.time() - mark.stat().st_mtime
    return {rank: seconds for rank, seconds in since.items() if seconds > max(heartbeat / 2, 3 * stuck.PULSE)}


def _end_silent(children: Sequence[Child], silent: Mapping[int, float], folder: Path) -> int:
    """Ends all because some hang; says which."""
    processes.kill([children[rank] for rank in silent])  # they would not hear anything else
    processes.end(children)
    for rank, seconds in silent.items():
        _say(
            f'error: process {rank} of {len(children)} hung, without a sign of life for {seconds:.0f} s;'
            ' all were stopped; the same command goes on'
        )
        _show_output(rank, folder)
    return Exit.FAILED


def _nobody_came(children: Sequence[Child], folder: Path, timeout: float) -> int:
    """Stops all because they have not joined in time."""
    late = [rank for rank in range(len(children)) if not _mark(folder, 'came', rank).exists()]
    processes.end(children)
    if late:
        listed = ', '.join(map(str, late))
        what = f'process {listed} of {len(children)} did not come within {timeout} s'
    else:
        what = f'the {len(children)} processes did not reach one another within {timeout} s'
    _say(f'error: {what}; all were stopped; --timeout sets how long to wait')
    for rank in late:
        _show_output(rank, folder)
    return Exit.FAILED


def _show_output(rank: int, folder: Path) -> None:
    """The end of what a process printed; that of the first is on the terminal already."""
    if rank > 0:
        lines = processes.last_lines(_output(folder, rank), 10) or ['(nothing)']
        _say('\n'.join([f'process {rank} printed last:', *(f'  {line}' for line in lines)]))


def _say(text: str) -> None:
    """Below what the first process shows, whose line may be unfinished on a terminal."""
    print(f'\n{text}' if sys.stderr.isatty() else text, file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def _output(folder: Path, rank: int) -> Path:
    return folder / f'output-{rank}'


def _mark(folder: Path, event: str, rank: int) -> Path:
    """The file by which a process tells that it ``came``, has ``joined`` the others, or is ``ALIVE``."""
    return folder / f'{event}-{rank}'


# ----- one of the processes -----------------------------------------------------------------------------------------


def _take_part(argv: Sequence[str]) -> int:
    """Runs the command as one of the processes."""
    command, argv = member.command_of(argv, PROGRAM)
    known, rest = build_parser().parse_known_args(argv)
    asked, overrides = member.asked(command, rest, PROGRAM)
    run = member.prepared(command, asked, [*overrides, f'mesh.cpu_devices={known.devices_per_process}'])
    if run is None:
        return Exit.DONE
    member.watch(known.patience, _mark(known.folder, ALIVE, known.rank))
    import jax  # noqa: F401 (takes seconds, before it can be said to have come)

    _mark(known.folder, 'came', known.rank).touch()
    member.join(
        known.timeout,
        known.heartbeat,
        coordinator_address=known.coordinator,
        num_processes=known.processes,
        process_id=known.rank,
        cluster_detection_method='deactivate',  # no scheduler is asked: a job of one may surround this
        coordinator_bind_address=known.coordinator,  # for this machine alone
    )
    _mark(known.folder, 'joined', known.rank).touch()
    return run()


if __name__ == '__main__':
    main()
