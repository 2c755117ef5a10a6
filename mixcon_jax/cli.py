"""The ``mixcon`` command: train, eval, generate, merge, plan, report, ...; each of its commands calls one function."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixcon_jax import parsing
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host.ending import exit_with
from mixcon_jax.host.output import go_on, use_utf8
from mixcon_jax.options import beyond

if TYPE_CHECKING:
    from mixcon_jax.evaluate import Scores

DESCRIPTION = 'Pretrain hybrid sequence models of attention, Conba and experts.'
OVERRIDES = 'Any option can be overridden: --config.train.steps=100 (see `mixcon config`).'
ON_MESH = 'On several devices: --config.mesh.fsdp=2 and the other options of config.mesh.'


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; bad input ends it with one line and exit code 2."""
    if argv is None:
        use_utf8()

    def run() -> int:
        known, rest = build_parser().parse_known_args(argv)
        command = f'mixcon {" ".join(sys.argv[1:2])}'
        overrides = parse_overrides(rest, command, takes=hasattr(known, 'config') or hasattr(known, 'step'))
        require_numbers(known)
        return known.run(known, overrides)

    exit_with(run)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of every command; ``known.run(known, overrides)`` runs what was asked for."""
    parser = argparse.ArgumentParser(prog='mixcon', description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(metavar='command', required=True)

    def add(name: str, run, text: str, parent=commands) -> argparse.ArgumentParser:
        command = parent.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    def takes_config(command: argparse.ArgumentParser) -> None:
        command.add_argument('--config', required=True, metavar='FILE[:ARG]', help='experiment file with get_config()')
        command.epilog = OVERRIDES

    command = add('train', _train, 'Pretrain a model, or continue: the same command resumes an interrupted run.')
    takes_config(command)
    command.add_argument('--workdir', required=True, help='folder of the run: checkpoints, metrics, tokenizer')

    command = add('eval', _eval, 'Score held-out text, or given files, with a checkpoint.')
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
        help="of a synthetic task, lengths of sequences to score (default: the run's)",
    )

    command = add('generate', _generate, 'Continue prompts with a checkpoint; a single one streams to the terminal.')
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

    command = add('merge', _merge, 'Fold the branches of large kernels into one kernel, in a new run directory.')
    command.add_argument('--workdir', required=True, help='folder of the run')
    command.add_argument('--out', required=True, metavar='DIR', help='new folder for the merged model')
    command.add_argument('--step', help='checkpoint to use: a step, "best" or "last" (default: last)')

    command = add('config', _config, "Print an experiment's resolved configuration as JSON.")
    takes_config(command)
    command.add_argument('--help-options', action='store_true', help='print every option with its meaning instead')

    command = add(
        'presets', _presets, 'List the published models that experiments/presets.py:NAME trains, with their sizes.'
    )
    command.add_argument('--json', action='store_true', help='every figure, as JSON')

    command = add('plan', _plan, 'Compile a step for GPUs that are not here: memory, exchanges, an estimate of time.')
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

    command = add('report', _report, 'Turn run directories, also unfinished ones, into tables and figures.')
    command.add_argument('folders', nargs='+', metavar='FOLDER', help='run directories, or folders above some')
    command.add_argument('--out', metavar='DIR', help='folder to write to (default: report in the first FOLDER)')
    command.add_argument('--baseline', metavar='NAME', help='arm to compare the others with (default: the first)')

    command = add('watch', _watch, 'Show runs in the terminal as they train: a table of all, one in detail.')
    command.add_argument('folders', nargs='+', metavar='DIR', help='a run, or any folder that holds runs')
    command.add_argument('--once', action='store_true', help='print one snapshot; so does output that is no terminal')
    command.add_argument('--interval', type=float, default=2.0, help='seconds between two looks (default: 2)')

    command = add(
        'distill-filters', _distill, "Turn a run's Hyena layers into modal ones, which decode with a constant state."
    )
    _takes_checkpoint(command)
    command.epilog = None
    command.add_argument('--out', required=True, metavar='DIR', help='folder of the new run; nothing may be there')
    command.add_argument('--order', type=int, default=0, help='modes a channel; 0: as --tolerance asks for (default)')
    command.add_argument(
        '--tolerance', type=float, default=0.01, help="share of a filter's singular values to leave out (default: 0.01)"
    )
    command.add_argument('--rows', type=int, default=64, help='rows of text to compare the two on (default: 64)')
    command.add_argument('files', nargs='*', help='text files to compare on; none: held-out text')

    command = add('doctor', _doctor, 'Say what works on this machine: devices, versions, kernels, a few steps.')
    command.add_argument('--verify', action='store_true', help='verify the GPU kernels that need it, without asking')

    analyses = commands.add_parser('analyze', help="Look into a checkpoint's features.", allow_abbrev=False)
    actions = analyses.add_subparsers(metavar='analysis', required=True)
    text = "Effective dimension of each layer's features: how many principal axes hold most of their variance."
    command = add('effective-dimension', _effective_dimension, text, actions)
    _takes_checkpoint(command)
    command.add_argument('files', nargs='*', help='text files to read (default: held-out text)')
    command.add_argument('--batch-size', type=int, default=0, help="rows of a batch (default: the run's)")
    command.add_argument('--share', type=float, default=0.8, help='of the variance, to be held (default: 0.8)')
    command.add_argument(
        '--skip', type=int, default=1, metavar='TOKENS', help="to leave out at a document's start (default: 1)"
    )
    command.add_argument('--json', action='store_true', help='the same as JSON')

    data = commands.add_parser('data', help='Prepare text for training.', allow_abbrev=False)
    actions = data.add_subparsers(metavar='action', required=True)
    command = add('prepare', _prepare, 'Train or load the tokenizer and write the token stores.', actions)
    takes_config(command)
    command = add('verify', _verify, 'Read token stores whole and compare them with their checksums.', actions)
    command.add_argument('stores', nargs='+', metavar='STORE', help='stores, or folders of stores (data.cache_dir)')
    return parser


def _takes_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument('--workdir', required=True, help='folder of the run')
    command.add_argument('--step', help='checkpoint to use: a step, "best" or "last" (default: last)')
    command.epilog = ON_MESH


# ----- commands -----------------------------------------------------------------------------------------------------


def _train(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.config import load
    from mixcon_jax.runs.workdir import report_if_finished

    go_on()
    config = load(known.config, overrides)
    if report_if_finished(config, known.workdir):
        return Exit.DONE
    from mixcon_jax.train import train  # loads JAX, which takes seconds

    return train(config, known.workdir).exit_code


def _eval(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.evaluate import evaluate

    _require_rows(known)
    scores = evaluate(known.workdir, known.files, _step(known.step), known.batch_size, known.lengths, overrides)
    print(f'step {scores.step}: {_described(scores)}')
    return Exit.DONE


def _described(scores: 'Scores') -> str:
    """Scores in a line or, of a task with several lengths, a line each."""
    from mixcon_jax.data.remarks import percent

    start = f'loss {scores.loss:.4f} nats per token, '
    if scores.bits_per_byte is not None:
        return (
            f'{start}perplexity {scores.perplexity:.2f}, {scores.bits_per_byte:.4f} bits per byte, '
            f'over {scores.tokens:,} tokens of {scores.bytes:,} bytes'
        )
    if scores.bytes:
        back = 'an unknown share' if scores.round_trip is None else percent(scores.round_trip)
        return (
            f'{start}perplexity {scores.perplexity:.2f}, no bits per byte, for the tokenizer gives back {back} of '
            f'{scores.bytes:,} bytes, over {scores.tokens:,} tokens'
        )
    lines = [f'{start}accuracy {scores.accuracy:.4f} over {scores.tokens:,} answers']
    if len(scores.by_length) > 1:
        for length, part in scores.by_length.items():
            lines.append(f'  {length:6} tokens: accuracy {part.accuracy:.4f} over {part.tokens:,} answers')
    return '\n'.join(lines)


def _generate(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.inference.generate import Sampling, generate_text

    for option in ('max_new_tokens', 'num_samples'):
        if getattr(known, option) < 1:
            raise UserError(f'--{option.replace("_", "-")} {getattr(known, option)} must be at least 1')
    generate_text(
        known.workdir,
        known.prompt or [''],
        max_new_tokens=known.max_new_tokens,
        num_samples=known.num_samples,
        sampling=Sampling(known.temperature, known.top_k, known.top_p),
        seed=known.seed,
        step=_step(known.step),
        mesh=overrides,
    )
    return Exit.DONE


def _merge(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.inference.merge import merge

    if overrides:
        raise UserError(f'unknown argument --config.{overrides[0]}; see `mixcon merge --help`')
    merge(known.workdir, known.out, _step(known.step))
    return Exit.DONE


def _config(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax import config as configs

    config = configs.validate(configs.load(known.config, overrides))
    if known.help_options:
        for key, option in configs.leaves():
            print(f'{key} = {configs.get(config, key)!r}\n    {option.meaning}')
        print("model.layers.NAME = {'kind': KIND, OPTION: VALUE, ...}")
        print('    A mixer or FFN by a name for patterns: of that kind, with these of its options replaced.')
    else:
        print(configs.to_json(config), end='')
    return Exit.DONE


def _watch(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.watching.watch import watch

    return watch(known.folders, known.once, known.interval)


def _doctor(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.doctor import doctor

    return doctor(known.verify)


def _distill(known: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise UserError(f'distill-filters takes no --config.{overrides[0].split("=")[0]}')
    for option, least in (('order', 0), ('rows', 1)):
        if getattr(known, option) < least:
            raise UserError(f'--{option} {getattr(known, option)} must be at least {least}')
    if not 0 < known.tolerance < 1:
        raise UserError(f'--tolerance {known.tolerance} must be between 0 and 1, exclusive')
    from mixcon_jax.distillation.distill import distill

    distill(
        known.workdir, known.out, step=_step(known.step), order=known.order, tolerance=known.tolerance,
        paths=known.files, rows=known.rows,
    )  # fmt: skip
    return Exit.DONE


def _prepare(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax import config as configs
    from mixcon_jax.data.prepare import baselines, prepare
    from mixcon_jax.data.remarks import percent
    from mixcon_jax.data.synthetic import is_synthetic

    go_on()
    config = configs.validate(configs.load(known.config, overrides))
    if is_synthetic(config.data):
        print(f'{config.data.sources[0]} is made as it is needed: there is nothing to prepare')
        return Exit.DONE
    stores = prepare(config.data)
    for store in stores:
        print(f'{store.spec}: {store.path}')
        for split in ('train', 'heldout'):
            part = store.open(split)
            counts = f'{part.num_documents:,} documents, {part.num_tokens:,} tokens, {part.num_bytes:,} bytes'
            print(f'  {split:8} {counts}')
        back = store.round_trip().values()
        print('  of the text come back', ', '.join('unknown' if share is None else percent(share) for share in back))
    values = baselines(stores)
    print(f'held-out text: {values["unigram"]:.3f} bits per byte by byte unigrams, {values["gzip"]:.3f} by gzip -9')
    return Exit.DONE


def _verify(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.data.integrity import verify_all
    from mixcon_jax.runs.mark import path_of

    for store in known.stores:
        path_of(store, 'STORE')
    return Exit.FAILED if verify_all(known.stores, print) else Exit.DONE


def _effective_dimension(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.analyses.effective_dimension import analyze

    _require_rows(known)
    found = analyze(known.workdir, known.files, _step(known.step), known.batch_size, known.share, known.skip, overrides)
    print(found.to_json() if known.json else found.to_text())
    return Exit.DONE


def _presets(known, overrides) -> int:
    from mixcon_jax.reports import presets

    presets.show(as_json=known.json)
    return 0


def _plan(known: argparse.Namespace, overrides: list[str]) -> int:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing runs: GPUs that may be here are left alone
    from mixcon_jax.planner.command import command

    for option, least in (('batch', 1), ('context', 0), ('search', 0)):
        if getattr(known, option) < least:
            raise UserError(f'--{option} {getattr(known, option)} must be at least {least}')
    return command(
        known.config, overrides, known.devices, memory_limit=known.memory_limit, what=known.what, batch=known.batch,
        context=known.context, products=known.products,
        json_file=known.json, most=known.search,
    )  # fmt: skip


def _report(known: argparse.Namespace, overrides: list[str]) -> int:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # shapes are all it needs: the accelerators are the runs'
    from mixcon_jax.reports.report import report

    report(known.folders, known.out, known.baseline)
    return Exit.DONE


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


def _require_rows(known: argparse.Namespace) -> None:
    if known.batch_size < 0:
        raise UserError(f'--batch-size {known.batch_size} must be at least 1')


def _step(text: str | None) -> int | str | None:
    """Reads --step: None is the newest."""
    try:
        return None if text is None else parsing.step(text)
    except ValueError as error:
        raise UserError(f'--step {error}') from error


def parse_overrides(rest: Sequence[str], command: str, takes: bool = True) -> list[str]:
    """Turns ``--config.key=value`` and ``--config.key value`` into ``key=value``.

    Args:
      rest: arguments that the parser of ``command`` did not know.
      command: whose help is named when one of them is something else.
      takes: whether the command takes a configuration at all.

    Raises:
      UserError: an argument is unknown or has no value.
    """
    overrides, rest = [], list(rest)
    while rest:
        argument = rest.pop(0)
        if not takes or not argument.startswith('--config.'):
            raise UserError(f'unknown argument {argument}; see `{command} --help`')
        key, separator, value = argument.removeprefix('--config.').partition('=')
        if not separator:
            if not rest or rest[0].startswith('--'):
                raise UserError(f'{argument} has no value; write {argument}=VALUE')
            value = rest.pop(0)
        overrides.append(f'{key}={value}')
    return overrides


if __name__ == '__main__':
    main()
