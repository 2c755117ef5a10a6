"""One of the processes of a command over several machines, each of which a scheduler, or a person, starts so.

    srun --ntasks-per-node=8 --kill-on-bad-exit=1 \\
      python -m launch.cluster --config experiments/mixcon/1_3b.py --workdir /shared/runs/1_3b

takes what ``mixcon train`` takes; ``launch.cluster eval`` and ``generate`` take what those of ``mixcon`` take. Who is
who, and where the first process is, JAX reads from the environment of SLURM, Open MPI or Kubernetes; there each process
has one GPU, unless JAX_LOCAL_DEVICE_IDS lists others. Elsewhere ``--coordinator``, ``--processes`` and ``--rank`` say
it, and each has all GPUs that it sees. The folder of the run and the data must be the same for all.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from launch import member
from mixcon_jax.cli import OVERRIDES, LineParser, require_numbers
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host.ending import of_jax
from mixcon_jax.host.output import use_utf8

PROGRAM = 'python -m launch.cluster'
DESCRIPTION = (
    'Be one of the processes of a training over several machines; all are given the same command. With eval or generate'
    ' as the first argument, of one of these. All else is as of `mixcon`.'
)
EPILOG = (
    f'{OVERRIDES} When one process dies or is stopped all others end, with {Exit.FAILED} or by an abort of JAX; the'
    ' same command goes on. Else exit codes are those of `mixcon train`.'
)
UNKNOWN = (
    'no scheduler that JAX knows has started this process (SLURM, Open MPI, Kubernetes); give --coordinator HOST:PORT,'
    ' --processes and --rank'
)


def main(argv: Sequence[str] | None = None) -> None:
    if argv is None:
        use_utf8()
    member.be(lambda: _take_part(sys.argv[1:] if argv is None else argv))


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(PROGRAM, description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument('--coordinator', metavar='HOST:PORT', help='a free port of the machine of process 0')
    parser.add_argument('--processes', type=int, metavar='N', help='number of all processes')
    parser.add_argument('--rank', type=int, metavar='R', help='number of this one, from 0')
    member.add_arguments(parser, timeout=300)
    return parser


def _take_part(argv: Sequence[str]) -> int:
    command, argv = member.command_of(argv, PROGRAM)
    known, rest = build_parser().parse_known_args(argv)
    asked, overrides = member.asked(command, rest, PROGRAM)
    require_numbers(known)
    member.require_positive(known, '--timeout', '--heartbeat', '--patience', '--processes')
    where = _where(known)
    run = member.prepared(command, asked, overrides)
    if run is None:
        return Exit.DONE
    member.watch(known.patience)
    try:
        member.join(known.timeout, known.heartbeat, **where)
    except ValueError as error:  # JAX has found no scheduler
        raise UserError(UNKNOWN) from error
    except RuntimeError as error:  # or cannot ask the one that it has found
        if of_jax(error):
            raise
        raise UserError(f'{error} Or give --coordinator HOST:PORT, --processes and --rank') from error
    return run()


def _where(known: argparse.Namespace) -> dict[str, Any]:
    """What JAX need not ask a scheduler for: all of it, or nothing.

    Raises:
      UserError: something is missing or cannot be.
    """
    given = {'--coordinator': known.coordinator, '--processes': known.processes, '--rank': known.rank}
    missing = [option for option, value in given.items() if value is None]
    if len(missing) == len(given):
        return {}
    if missing:
        raise UserError(f'{", ".join(missing)} is missing; give all of {", ".join(given)}, or none')
    _, colon, port = known.coordinator.rpartition(':')
    if not colon or not port.isdigit():
        raise UserError(f'--coordinator {known.coordinator} must be HOST:PORT')
    if not 0 <= known.rank < known.processes:
        raise UserError(f'--rank {known.rank} must be at least 0 and below --processes {known.processes}')
    return {
        'coordinator_address': known.coordinator,
        'num_processes': known.processes,
        'process_id': known.rank,
        'cluster_detection_method': 'deactivate',
    }


if __name__ == '__main__':
    main()
