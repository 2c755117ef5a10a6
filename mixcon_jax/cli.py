"""The ``mixcon`` command: train, eval, generate, merge, plan, report, ...; each of its commands calls one function."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mixcon_jax import commands
from mixcon_jax.errors import UserError
from mixcon_jax.host.ending import exit_with
from mixcon_jax.host.output import use_utf8
from mixcon_jax.options import beyond

DESCRIPTION = 'Pretrain hybrid sequence models of attention, Conba and experts.'
OVERRIDES = 'Any option can be overridden: --config.train.steps=100 (see `mixcon config`).'
ON_MESH = 'On several devices: --config.mesh.fsdp=2 and the other options of config.mesh.'


class LineParser(argparse.ArgumentParser):
    """Ends in one line, as all bad input does, where argparse prints how to use a command, too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message}; see `{self.prog} --help`')


class Parser(LineParser):
    """Leaves overrides alone: no value of one is an argument of the command's own, as in ``--config.key value``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        overrides, others = _apart(sys.argv[1:] if args is None else args)
        known, rest = super().parse_known_args(others, namespace)
        return known, [*overrides, *rest]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; bad input ends it with one line and exit code 2."""
    if argv is None:
        use_utf8()

    def run() -> int:
        known, rest = build_parser().parse_known_args(argv)
        overrides = parse_overrides(rest, known.program, takes=known.takes_overrides)
        require_numbers(known)
        return known.run(known, overrides)

    exit_with(run)


def build_parser(program: str = 'mixcon') -> argparse.ArgumentParser:
    """Returns the parser of every command; ``known.run(known, overrides)`` runs what was asked for.

    Args:
      program: its name in usage errors.
    """
    parser = Parser(prog=program, description=DESCRIPTION, allow_abbrev=False)
    subparsers = parser.add_subparsers(metavar='command', required=True)

    def add(name: str, run, text: str, parent=subparsers) -> argparse.ArgumentParser:
        command = parent.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run, program=command.prog, takes_overrides=False)
        return command

    def takes_config(command: argparse.ArgumentParser) -> None:
        command.add_argument('--config', required=True, metavar='FILE[:ARG]', help='experiment file with get_config()')
        _takes_overrides(command, OVERRIDES)

    command = add(
        'train', commands.train, 'Pretrain a model, or continue: the same command resumes an interrupted run.'
    )
    takes_config(command)
    command.add_argument('--workdir', required=True, help='folder of the run: checkpoints, metrics, tokenizer')

    command = add('eval', commands.evaluate, 'Score held-out text, or given files, with a checkpoint.')
    _takes_checkpoint(command)
    command.add_argument(
        'files', nargs='*', help='text files (.txt .jsonl .parquet, also .gz .zst); none: held-out text'
    )
    command.add_argument('--batch-size', type=int, default=0, help="rows of a batch (default: the run's)")
    command.add_argument(
        '--lengths',
        nargs='+',
        type=int,
        default=(),
        metavar='TOKENS',
        help="lengths of a synthetic task's sequences, or of text one, that of its rows (default: the run's)",
    )

    command = add(
        'generate', commands.generate, 'Continue prompts with a checkpoint; a single one streams to the terminal.'
    )
    _takes_checkpoint(command)
    command.add_argument('--prompt', action='append', help='text to continue; repeat it for several (default: none)')
    command.add_argument('--max-new-tokens', type=int, default=128, help='tokens to generate (default: 128)')
    command.add_argument('--num-samples', type=int, default=1, help='samples of each prompt (default: 1)')
    command.add_argument('--temperature', type=float, default=0.8, help='0 takes the likeliest token (default: 0.8)')
    command.add_argument('--top-k', type=int, default=0, help='draw from the k likeliest tokens; 0: all (default)')
    command.add_argument(
        '--top-p', type=float, default=0.95, help='draw from the likeliest p of the mass (default: 0.95)'
    )
    command.add_argument('--seed', type=int, default=0, help='seed of the draws (default: 0)')

    command = add('lm-eval', commands.lm_eval, "Evaluate a checkpoint on tasks of EleutherAI's lm-evaluation-harness.")
    _takes_checkpoint(command)
    command.add_argument('--tasks', nargs='+', required=True, metavar='TASK', help='such as lambada_openai hellaswag')
    command.add_argument('--num-fewshot', type=int, help="examples before each question (default: the task's)")
    command.add_argument('--limit', type=int, metavar='N', help='questions of each task at most (default: all)')
    command.add_argument('--batch-size', type=int, default=8, help='rows at a time (default: 8)')
    command.add_argument(
        '--max-length', type=int, default=0, help='tokens that are read at most (default: data.seq_len)'
    )
    command.add_argument('--include-path', default='', metavar='DIR', help='folder with tasks of your own')
    command.add_argument('--json', default='', metavar='FILE', help='write the results there as well')

    command = add(
        'merge', commands.merge, 'Fold the branches of large kernels into one kernel, in a new run directory.'
    )
    _takes_checkpoint(command, mesh=False)
    command.add_argument('--out', required=True, metavar='DIR', help='new folder for the merged model')

    command = add(
        'import', commands.import_model, 'Make a run directory of a published model that lies in a folder here.'
    )
    command.add_argument(
        '--from', dest='source', required=True, metavar='DIR', help='config.json, safetensors files, tokenizer.json'
    )
    command.add_argument('--out', required=True, metavar='DIR', help='new folder for the imported model')
    command.add_argument('--tokenizer', default='', metavar='FILE', help="another tokenizer.json (default: DIR's)")

    command = add(
        'export', commands.export_model, 'Write a checkpoint as a folder that Hugging Face transformers loads.'
    )
    _takes_checkpoint(command, mesh=False)
    command.add_argument('--out', required=True, metavar='DIR', help='new folder for the exported model')
    command.add_argument(
        '--dtype', default='float32', choices=('float32', 'bfloat16'), help='of the weights (default: float32)'
    )

    command = add('config', commands.config, "Print an experiment's resolved configuration as JSON.")
    takes_config(command)
    command.add_argument('--help-options', action='store_true', help='print every option with its meaning instead')

    command = add(
        'presets',
        commands.presets,
        'List the published models that experiments/presets.py:NAME trains, with sizes.',
    )
    command.add_argument('--json', action='store_true', help='every figure, as JSON')

    command = add(
        'plan', commands.plan, 'Compile a step for GPUs that are not here: memory, exchanges, an estimate of time.'
    )
    takes_config(command)
    command.add_argument(
        '--devices', required=True, metavar='MODEL:HOSTSxDEVICES', help='such as h100:16x8: 16 hosts with 8 each'
    )
    command.add_argument(
        '--memory-limit', default='', metavar='SIZE', help='such as 72GiB (default: 90 %% of a device)'
    )
    command.add_argument(
        '--what', default='train', choices=('train', 'prefill', 'decode'), help='step to compile (default: train)'
    )
    command.add_argument('--batch', type=int, default=1, help='of prefill and decode, sequences (default: 1)')
    command.add_argument('--context', type=int, default=0, help='of them, tokens (default: data.seq_len)')
    command.add_argument(
        '--products', nargs='+', default=('triton', 'cublas'), choices=('triton', 'cublas'),
        help='what computes matrix products; a GPU chooses one by one (default: both)',
    )  # fmt: skip
    command.add_argument('--json', default='', metavar='FILE', help='write everything there as well')
    command.add_argument(
        '--search', type=int, nargs='?', const=8, default=0, metavar='N',
        help='plan N meshes, recomputations and microbatches in turn, and show which are best (default: 8)',
    )  # fmt: skip
    command.add_argument(
        '--picture', default='', metavar='FILE', help='of a search, draw memory against seconds there: .svg or .png'
    )

    command = add('report', commands.report, 'Turn run directories, also unfinished ones, into tables and figures.')
    command.add_argument('folders', nargs='+', metavar='FOLDER', help='run directories, or folders above some')
    command.add_argument('--out', metavar='DIR', help='folder to write to (default: report in the first FOLDER)')
    command.add_argument('--baseline', metavar='NAME', help='arm to compare the others with (default: the first)')

    command = add('watch', commands.watch, 'Show runs in the terminal as they train: a table of all, one in detail.')
    command.add_argument('folders', nargs='+', metavar='DIR', help='a run, or any folder that holds runs')
    command.add_argument('--once', action='store_true', help='print one snapshot; so does output that is no terminal')
    command.add_argument('--interval', type=float, default=2.0, help='seconds between two looks (default: 2)')

    command = add(
        'distill-filters',
        commands.distill,
        "Turn a run's Hyena layers into modal ones, of a constant state.",
    )
    _takes_checkpoint(command, mesh=False)
    command.add_argument('--out', required=True, metavar='DIR', help='folder of the new run; nothing may be there')
    command.add_argument('--order', type=int, default=0, help='modes a channel; 0: as --tolerance asks for (default)')
    command.add_argument(
        '--tolerance', type=float, default=0.01, help="share of a filter's singular values to leave out (default: 0.01)"
    )
    command.add_argument('--rows', type=int, default=64, help='rows of text to compare the two on (default: 64)')
    command.add_argument('files', nargs='*', help='text files to compare on; none: held-out text')

    command = add('doctor', commands.doctor, 'Say what works on this machine: devices, versions, kernels, a few steps.')
    command.add_argument('--verify', action='store_true', help='verify the GPU kernels that need it, without asking')

    analyses = subparsers.add_parser('analyze', help="Look into a checkpoint's features.", allow_abbrev=False)
    actions = analyses.add_subparsers(metavar='analysis', required=True)
    text = "Effective dimension of each layer's features: how many principal axes hold most of their variance."
    command = add('effective-dimension', commands.effective_dimension, text, actions)
    _takes_checkpoint(command)
    command.add_argument('files', nargs='*', help='text files to read (default: held-out text)')
    command.add_argument('--batch-size', type=int, default=0, help="rows of a batch (default: the run's)")
    command.add_argument('--share', type=float, default=0.8, help='of the variance, to be held (default: 0.8)')
    command.add_argument(
        '--skip', type=int, default=1, metavar='TOKENS', help="to leave out at a document's start (default: 1)"
    )
    command.add_argument('--json', action='store_true', help='the same as JSON')

    data = subparsers.add_parser('data', help='Prepare text for training.', allow_abbrev=False)
    actions = data.add_subparsers(metavar='action', required=True)
    command = add('prepare', commands.prepare, 'Train or load the tokenizer and write the token stores.', actions)
    takes_config(command)
    command = add('verify', commands.verify, 'Read token stores whole and compare them with their checksums.', actions)
    command.add_argument('stores', nargs='+', metavar='STORE', help='stores, or folders of stores (data.cache_dir)')
    return parser


def _takes_checkpoint(command: argparse.ArgumentParser, mesh: bool = True) -> None:
    command.add_argument('--workdir', required=True, help='folder of the run')
    command.add_argument('--step', help='checkpoint to use: a step, "best" or "last" (default: last)')
    if mesh:
        _takes_overrides(command, ON_MESH)


def _takes_overrides(command: argparse.ArgumentParser, words: str) -> None:
    command.set_defaults(takes_overrides=True)
    command.epilog = words


# ----- arguments ----------------------------------------------------------------------------------------------------


def require_numbers(known: argparse.Namespace) -> None:
    """Refuses numbers that would be others in 32 bits.

    Raises:
      UserError: names the argument.
    """
    for name, value in vars(known).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            # A seed may be as large as 32 bits without a sign allow; generate_text() sees to it.
            if isinstance(number, int | float) and name != 'seed' and (words := beyond(number)):
                raise UserError(f'--{name.replace("_", "-")} {number!r} {words}')


def parse_overrides(rest: Sequence[str], command: str, takes: bool = True) -> list[str]:
    """Turns ``--config.key=value`` into ``key=value``.

    Args:
      rest: arguments that the parser of ``command``, a ``Parser``, did not know.
      command: whose help is named when one of them is something else.
      takes: whether the command takes a configuration at all.

    Raises:
      UserError: an argument is unknown or has no value.
    """
    overrides = []
    for argument in rest:
        if not takes or not argument.startswith('--config.'):
            raise UserError(f'unknown argument {argument}; see `{command} --help`')
        key, separator, value = argument.removeprefix('--config.').partition('=')
        if not separator:
            raise UserError(f'{argument} has no value; write {argument}=VALUE')
        overrides.append(f'{key}={value}')
    return overrides


def _apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, each as ``--config.key=value`` where it has a value, and all else; after ``--`` there are none."""
    end = arguments.index('--') if '--' in arguments else len(arguments)
    overrides: list[str] = []
    others: list[str] = []
    waiting = list(arguments[:end])
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith('--config.'):
            others.append(argument)
        elif '=' not in argument and waiting and not waiting[0].startswith('--'):
            overrides.append(f'{argument}={waiting.pop(0)}')
        else:
            overrides.append(argument)
    return overrides, [*others, *arguments[end:]]


if __name__ == '__main__':
    main()
