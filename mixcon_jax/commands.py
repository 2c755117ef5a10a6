"""What the commands do: a function each, which calls the one that does it and prints what it returns."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from mixcon_jax import parsing
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host.output import go_on

if TYPE_CHECKING:
    from mixcon_jax.evaluate import Scores


def train(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.config import load
    from mixcon_jax.runs.workdir import report_if_finished

    go_on()
    config = load(known.config, overrides)
    if report_if_finished(config, known.workdir):
        return Exit.DONE
    from mixcon_jax.train import train  # loads JAX, which takes seconds

    return train(config, known.workdir).exit_code


def evaluate(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.evaluate import evaluate

    _require_rows(known)
    scores = evaluate(known.workdir, known.files, _step(known.step), known.batch_size, known.lengths, overrides)
    print(f'step {scores.step}: {_described(scores)}')
    return Exit.DONE


def _described(scores: 'Scores') -> str:
    """Scores in a line or, of a task with several lengths, a line each."""
    from mixcon_jax.data.remarks import percent

    rows = f'in rows of {max(scores.by_length):,}'
    start = f'loss {scores.loss:.4f} nats per token, '
    if scores.bits_per_byte is not None:
        return (
            f'{start}perplexity {scores.perplexity:.2f}, {scores.bits_per_byte:.4f} bits per byte, '
            f'over {scores.tokens:,} tokens of {scores.bytes:,} bytes, {rows}'
        )
    if scores.bytes:
        back = 'an unknown share' if scores.round_trip is None else percent(scores.round_trip)
        return (
            f'{start}perplexity {scores.perplexity:.2f}, no bits per byte, for the tokenizer gives back {back} of '
            f'{scores.bytes:,} bytes, over {scores.tokens:,} tokens, {rows}'
        )
    lines = [f'{start}accuracy {scores.accuracy:.4f} over {scores.tokens:,} answers']
    if len(scores.by_length) > 1:
        for length, part in scores.by_length.items():
            lines.append(f'  {length:6} tokens: accuracy {part.accuracy:.4f} over {part.tokens:,} answers')
    return '\n'.join(lines)


def generate(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.inference.generate import Sampling, generate_text

    _require_at_least(known, max_new_tokens=1, num_samples=1)
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


def lm_eval(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.inference.tasks import run

    _require_at_least(known, num_fewshot=0, limit=1, batch_size=1, max_length=0)
    print(run(
        known.workdir, known.tasks, step=_step(known.step), batch_size=known.batch_size, max_length=known.max_length,
        num_fewshot=known.num_fewshot, limit=known.limit, include_path=known.include_path, json_file=known.json,
        mesh=overrides, say=lambda line: print(line, file=sys.stderr, flush=True),
    ))  # fmt: skip
    return Exit.DONE


def merge(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.distillation.merge import merge

    merge(known.workdir, known.out, _step(known.step))
    return Exit.DONE


def import_model(known: argparse.Namespace, overrides: list[str]) -> int:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # weights pass through: the host holds what a GPU may not
    from mixcon_jax.interop.importing import import_model

    import_model(known.source, known.out, known.tokenizer)
    return Exit.DONE


def export_model(known: argparse.Namespace, overrides: list[str]) -> int:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # as above
    from mixcon_jax.interop.exporting import export_model

    export_model(known.workdir, known.out, _step(known.step), known.dtype)
    return Exit.DONE


def config(known: argparse.Namespace, overrides: list[str]) -> int:
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


def watch(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.watching.watch import watch

    return watch(known.folders, known.once, known.interval)


def doctor(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.doctor import doctor

    return doctor(known.verify)


def distill(known: argparse.Namespace, overrides: list[str]) -> int:
    _require_at_least(known, order=0, rows=1)
    if not 0 < known.tolerance < 1:
        raise UserError(f'--tolerance {known.tolerance} must be between 0 and 1, exclusive')
    from mixcon_jax.distillation.distill import distill

    distill(
        known.workdir, known.out, step=_step(known.step), order=known.order, tolerance=known.tolerance,
        paths=known.files, rows=known.rows,
    )  # fmt: skip
    return Exit.DONE


def prepare(known: argparse.Namespace, overrides: list[str]) -> int:
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


def verify(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.data.integrity import verify_all
    from mixcon_jax.runs.mark import path_of

    for store in known.stores:
        path_of(store, 'STORE')
    return Exit.FAILED if verify_all(known.stores, print) else Exit.DONE


def effective_dimension(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.analyses.effective_dimension import analyze

    _require_rows(known)
    found = analyze(known.workdir, known.files, _step(known.step), known.batch_size, known.share, known.skip, overrides)
    print(found.to_json() if known.json else found.to_text())
    return Exit.DONE


def presets(known: argparse.Namespace, overrides: list[str]) -> int:
    from mixcon_jax.reports import presets

    presets.show(as_json=known.json)
    return Exit.DONE


def plan(known: argparse.Namespace, overrides: list[str]) -> int:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing runs: GPUs that may be here are left alone
    from mixcon_jax.planner.command import command

    _require_at_least(known, batch=1, context=0, search=0)
    return command(
        known.config, overrides, known.devices, memory_limit=known.memory_limit, what=known.what, batch=known.batch,
        context=known.context, products=known.products,
        json_file=known.json, most=known.search, picture=known.picture,
    )  # fmt: skip


def report(known: argparse.Namespace, overrides: list[str]) -> int:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # shapes are all it needs: the accelerators are the runs'
    from mixcon_jax.reports.report import report

    report(known.folders, known.out, known.baseline)
    return Exit.DONE


# ----- arguments ----------------------------------------------------------------------------------------------------


def _require_rows(known: argparse.Namespace) -> None:
    if known.batch_size:  # 0 is the run's own
        _require_at_least(known, batch_size=1)


def _require_at_least(known: argparse.Namespace, **least: int) -> None:
    """Refuses numbers of arguments that are less; one that is not given is None."""
    for name, low in least.items():
        if (value := getattr(known, name)) is not None and value < low:
            raise UserError(f'--{name.replace("_", "-")} {value} must be at least {low}')


def _step(text: str | None) -> int | str | None:
    """Reads --step: None is the newest."""
    try:
        return None if text is None else parsing.step(text)
    except ValueError as error:
        raise UserError(f'--step {error}') from error
