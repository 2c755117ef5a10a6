"""The page of a report: report.md as Markdown, and its short table for the terminal."""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata

from mixcon_jax.reports import comparison, tables
from mixcon_jax.reports.arms import Arm, numeric_axis
from mixcon_jax.reports.comparison import Difference, Score, summary
from mixcon_jax.runs.run import DONE
from mixcon_jax.units import columns, short

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
    return columns(lines) + ''.join(f'\nnote: {note}' for note in found.notes)
