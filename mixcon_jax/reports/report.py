"""`mixcon report`: run directories become tables and figures that one can put into a paper, or argue with.

Reads metrics.jsonl and the configuration (that of the newest checkpoint where there is one, else config.json), so it
works while runs are going on and changes nothing in them.
"""

import dataclasses
import difflib
import os
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from mixcon_jax.errors import UserError
from mixcon_jax.reports import comparison, figures, tables
from mixcon_jax.reports.arms import Arm, group, numeric_axis
from mixcon_jax.reports.comparison import Difference, Score, summary
from mixcon_jax.reports.runs import find, number
from mixcon_jax.runs.mark import path_of
from mixcon_jax.runs.run import DONE
from mixcon_jax.runs.workdir import explained
from mixcon_jax.units import short

FIGURES = {  # name: caption
    'final': 'Final held-out scores of the finished runs, a dot a seed; bars are the mean ± standard deviation.',
    'differences': 'Differences to the baseline, paired by seed, with 95 % t intervals; hollow ones are not resolved.',
    'loss-tokens': 'Held-out loss against training tokens: thick lines are means over seeds, thin ones single runs.',
    'loss-flops': 'The same against training FLOPs (tokens times FLOPs per token).',
    'accuracy-by-length': 'Accuracy against the length of the sequence: mean, and smallest to largest seed.',
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report is made of.

    Attributes:
      arms: in the order of the tables.
      baseline: the arm that the others are compared with.
      score: what is compared.
      differences: ``{label: difference}`` of the other arms.
      notes: what a reader must know about the runs, each a sentence.
    """

    arms: Sequence[Arm]
    baseline: Arm
    score: Score
    differences: Mapping[str, Difference]
    notes: Sequence[str]


def report(folders: Sequence[str | Path], out: str | Path | None = None, baseline: str | None = None) -> Path:
    """Writes report.md, runs.csv, arms.csv and the figures; prints a short table.

    Args:
      folders: run directories, or folders above some.
      out: folder to write to, which gives the title; None is ``report`` in the first of ``folders``, which then does.
      baseline: label of the arm to compare the others with; None is the first.

    Returns:
      The path of report.md.

    Raises:
      UserError: there is no run, no such baseline, or ``out`` cannot be written.
    """
    target = path_of(out, '--out') if out is not None else path_of(folders[0], 'FOLDER') / 'report'
    _require_ours(target)
    found = collect(folders, baseline)
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
    _write(target / 'runs.csv', tables.to_csv(tables.run_rows(found.arms)))
    rows = tables.arm_rows(found.arms, found.baseline, found.score, found.differences)
    _write(target / 'arms.csv', tables.to_csv(rows))
    drawn = figures.draw(found.arms, found.baseline, found.score, found.differences)
    for name in FIGURES:
        for kind in ('png', 'svg'):
            path = target / f'{name}.{kind}'
            if name in drawn:
                _write(path, drawn[name][kind])
            else:  # of an earlier report, when it had the data
                with explained(path):
                    path.unlink(missing_ok=True)
    command = ['mixcon', 'report', *map(str, folders)]
    command += ['--out', str(out)] if out is not None else []
    command += ['--baseline', baseline] if baseline is not None else []
    page = target / 'report.md'
    subject = target if out is not None else target.parent
    _write(page, markdown(found, drawn.keys(), subject.absolute().name, shlex.join(command)))
    print(terminal(found))
    print(f'\n{page}')
    return page


def _require_ours(target: Path) -> None:
    """Refuses a folder in which the report would replace or delete files of something else."""
    names = ['report.md', 'runs.csv', 'arms.csv', *(f'{name}.{kind}' for name in FIGURES for kind in ('png', 'svg'))]
    foreign = [name for name in names if (target / name).is_file()]
    with explained(target):
        page = (target / 'report.md').read_bytes() if 'report.md' in foreign else b''
    if foreign and not (page.startswith(b'# Report: ') and b'\n`mixcon report ' in page):
        raise UserError(f'{target} holds {", ".join(foreign)}, but no report of mixcon; take another folder for --out')


def collect(folders: Sequence[str | Path], baseline: str | None = None) -> Report:
    """Reads the runs, groups them into arms and compares these.

    Raises:
      UserError: there is no run, or no such baseline.
    """
    runs, notes = find(folders)
    arms, more = group(runs)
    base = _baseline(arms, baseline)
    score = comparison.score_for(arms)
    differences, rest = comparison.against(arms, base, score)
    return Report(arms, base, score, differences, [*notes, *more, *_notes(arms), *rest])


def _baseline(arms: Sequence[Arm], wanted: str | None) -> Arm:
    if wanted is None:
        return arms[0]
    for arm in arms:
        if arm.label == wanted:
            return arm
    labels = [arm.label for arm in arms]
    close = difflib.get_close_matches(wanted, labels, n=1, cutoff=0.5)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise UserError(f'--baseline {wanted!r} is no arm; {hint}the arms are {", ".join(map(repr, labels))}')


def _notes(arms: Sequence[Arm]) -> list[str]:
    """What limits the comparison of these arms."""
    notes = []
    for arm in arms:
        if aborted := [run.seed for run in arm.runs if run.state == 'aborted']:
            notes.append(
                f'{arm.label}: seeds {_list(aborted)} ended because the loss or gradient was not finite;'
                ' its means are over the other seeds and flatter it'
            )
        if broken := [run.seed for run in arm.runs if run.state == DONE and run not in arm.finished]:
            notes.append(f'{arm.label}: seeds {_list(broken)} are done but their final loss is not finite; left out')
    finished = [run for arm in arms for run in arm.finished]
    if len({tuple(run.seed for run in arm.finished) for arm in arms if arm.finished}) > 1:
        notes.append('the arms have finished different seeds; only differences paired by seed compare them fairly')
    if len({run.text for run in finished}) > 1:
        notes.append('the arms were scored on different held-out text; compare only those of the same data.sources')
    if comparison.score_for(arms) is comparison.BITS:
        notes.append('the arms cut the same text into different tokens: compared by bits per byte, not by loss')
    tokens = {run.tokens_seen for run in finished}
    if tokens and max(tokens) > 1.01 * min(tokens):
        notes.append(f'the arms saw between {short(min(tokens))} and {short(max(tokens))} training tokens')
    if len({tuple(number(r, 'tokens') for r in run.evals[-1:]) for run in finished if run.evals}) > 1:
        notes.append('evaluations during the runs are over different rows; curves compare less well than final scores')
    if len({run.devices for arm in arms for run in arm.runs if run.rates}) > 1:
        notes.append('the runs used different numbers of devices; tokens/s do not compare')
    return notes


def _list(values: Iterable[int]) -> str:
    return ', '.join(map(str, values))


# ----- the page -----------------------------------------------------------------------------------------------------


def markdown(found: Report, drawn: Iterable[str], title: str, command: str) -> str:
    """The whole page.

    Args:
      found: the report.
      drawn: names of the figures beside the page.
      title: what stands above it.
      command: what made it.
    """
    arms, names = found.arms, set(drawn)
    runs = [run for arm in arms for run in arm.runs]
    done = sum(run.state == DONE for run in runs)

    def figure(name: str) -> str:
        return f'\n![{name}]({name}.png)\n\n*{FIGURES[name]}* ([SVG]({name}.svg))\n' if name in names else ''

    parts = [
        f'# Report: {title}\n\n`{command}`\n\n'
        f'{time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())} · mixcon_jax {_version("mixcon-jax")}'
        f' · jax {_version("jax")}\n\n'
        f'{_count(len(runs), "run")} in {_count(len(arms), "arm")}, {done} done. An arm is one configuration; its runs'
        f' differ in the seed. {_swept(arms)} Every number of this page stands in [arms.csv](arms.csv) or'
        ' [runs.csv](runs.csv).\n'
    ]
    if found.notes:
        parts.append('## Notes\n\n' + ''.join(f'- {note}\n' for note in found.notes))
    if arms[0].options:
        parts.append('## What differs\n\n' + tables.options(arms))
    parts.append('## Size and speed\n\n' + tables.sizes(arms) + '\n' + _SIZES)
    parts.append('## Final held-out scores\n\n' + _finals(found) + figure('final'))
    if rest := tables.unfinished(arms):
        parts.append('## Unfinished runs\n\n' + rest + '\n' + _UNFINISHED)
    if len(arms) > 1:
        text = tables.differences(found.differences) + '\n'
        text += tables.caveats(found.differences, found.score, found.baseline)
        parts.append(f'## Against {found.baseline.label}\n\n' + text + figure('differences'))
    if 'loss-tokens' in names:
        parts.append('## Curves\n' + figure('loss-tokens') + figure('loss-flops'))
    if lengths := tables.lengths(arms):
        parts.append('## Accuracy by length\n\n' + lengths + figure('accuracy-by-length'))
    return '\n'.join(parts)


_SIZES = """\
*Active* parameters are those that one token uses; *added* is what layers add to those that they extend, as Conba
does to Mamba's mixer, contained in both. FLOPs per token count forward and backward at the trained length, without
recomputation. Tokens/s is the median over all training records, as the runs went: what else ran on the machine is in
it. *State* is what decoding one sequence keeps with that many tokens of context.
"""
_UNFINISHED = """\
*unfinished* runs are going on, or were killed; *stopped* ones were saved on a signal; *aborted* ones were not finite.
These scores are of the newest evaluation during the run, which may be over fewer rows than a final one, and enter no
mean and no comparison.
"""


def _finals(found: Report) -> str:
    if not any(arm.finished for arm in found.arms):
        return 'No run is done yet.\n'
    if found.score is comparison.ACCURACY:
        units = 'nats per answer and share of right answers, over all scored lengths together'
    else:
        units = 'nats per token and bits per byte of everything held out; accuracy is that of the likeliest token'
    return (
        tables.finals(found.arms, found.score.key)
        + f'\nMean ± sample standard deviation over the seeds of finished runs, in {units}. '
        + tables.simpler_models(found.arms)
    )


def _swept(arms: Sequence[Arm]) -> str:
    if len(arms) == 1:
        return 'There is one arm, so nothing to compare.'
    if key := numeric_axis(arms):
        return f'The arms differ in {key} alone and come in its order.'
    return 'The arms come in the order in which their first seeds were started.'


def _count(number: int, noun: str) -> str:
    return f'{number} {noun}' + ('' if number == 1 else 's')


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'unknown'


def terminal(found: Report) -> str:
    """A short table for the terminal, and the notes."""
    head = (
        'arm',
        'parameters',
        'FLOPs/token',
        'tokens/s',
        'runs',
        f'final {found.score.key}',
        f'to {found.baseline.label}',
        '',
    )
    lines = [head]
    for arm in found.arms:
        difference = found.differences.get(arm.label)
        lines.append((
            arm.label, short(arm.costs.counts.total), short(arm.costs.flops_per_token),
            tables.fixed(arm.tokens_per_second, 0), tables.states(arm),
            tables.mean(summary(arm.finals(found.score.key).values())),
            tables.signed(difference.mean) if difference else tables.NONE, difference.verdict if difference else '',
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
    return text + ''.join(f'\nnote: {note}' for note in found.notes)


def _write(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole."""
    scratch = path.with_name(f'.{path.name}.tmp')
    with explained(path):
        try:
            scratch.write_bytes(content if isinstance(content, bytes) else content.encode(errors='backslashreplace'))
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
