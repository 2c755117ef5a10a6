"""Tables of a report as Markdown and CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mixcon_jax.reports.arms import LONG_CONTEXT, Arm, shown
from mixcon_jax.reports.comparison import CONFIDENCE, Difference, Score, Summary, summary, t_factor
from mixcon_jax.reports.curves import accuracies, by_length
from mixcon_jax.reports.runs import ReportedRun, number
from mixcon_jax.runs.run import DONE
from mixcon_jax.runs.scores import BASELINES
from mixcon_jax.units import short

NONE = '–'
SCORES = {'loss': 'loss', 'bits_per_byte': 'bits per byte', 'accuracy': 'accuracy'}
Row = dict[str, Any]


# ----- CSV ----------------------------------------------------------------------------------------------------------


def run_rows(arms: Sequence[Arm]) -> list[Row]:
    """One row a run, with full precision."""
    lengths = sorted({length for arm in arms for run in arm.runs for length in by_length(run.final)})
    return [_run_row(arm, run, lengths) for arm in arms for run in arm.runs]


def _run_row(arm: Arm, run: ReportedRun, lengths: Sequence[int]) -> Row:
    evaluated = run.evals[-1] if run.evals else None
    trained = run.train[-1] if run.train else None
    rate = float(np.median(run.rates)) if run.rates else math.nan
    by = by_length(run.final)
    return {
        'arm': arm.label, 'name': run.config.name, 'seed': run.seed, 'path': str(run.path), 'state': run.state,
        'step': run.step, 'steps': run.config.train.steps, 'tokens_seen': round(run.tokens_seen),
        'training_flops': run.tokens_seen * arm.costs.flops_per_token,
        'final_loss': number(run.final, 'loss'), 'final_bits_per_byte': number(run.final, 'bits_per_byte'),
        'final_perplexity': number(run.final, 'perplexity'), 'heldout_tokens': number(run.final, 'tokens'),
        'heldout_bytes': number(run.final, 'bytes'), 'final_accuracy': number(run.final, 'accuracy'),
        **{f'final_accuracy_{length}': by.get(length) for length in lengths},
        'eval_step': number(evaluated, 'step'), 'eval_loss': number(evaluated, 'loss'),
        'eval_bits_per_byte': number(evaluated, 'bits_per_byte'), 'train_loss': number(trained, 'loss'),
        'tokens_per_second': rate,
        'devices': run.devices, 'seconds': run.seconds or math.nan, 'started': stamp(run.started),
        'last_record': stamp(run.last_time),
    } | _options(arm)  # fmt: skip


def arm_rows(arms: Sequence[Arm], baseline: Arm, score: Score, differences: Mapping[str, Difference]) -> list[Row]:
    """One row an arm, with full precision."""
    finals = [found if final else {} for found, final in map(accuracies, arms)]
    lengths = sorted({length for found in finals for length in found})
    rows = []
    for arm, by in zip(arms, finals):
        costs, rate = arm.costs, arm.tokens_per_second
        row: Row = {'arm': arm.label} | _options(arm)
        row |= {
            'parameters': costs.counts.total, 'parameters_active': costs.counts.active,
            'parameters_added': costs.counts.added, 'flops_per_token': costs.flops_per_token,
            'tokens_per_second': rate, 'context': arm.config.data.seq_len, 'state_bytes': costs.state_bytes,
            f'state_bytes_{LONG_CONTEXT}': costs.state_bytes_long, 'tokens_seen': round(arm.tokens_seen),
            'runs': len(arm.runs), 'finished': len(arm.finished),
        }  # fmt: skip
        scores = {key: list(arm.finals(key).values()) for key in SCORES}
        scores |= {f'accuracy_{length}': by.get(length, []) for length in lengths}
        for key, values in scores.items():
            about = summary(values)
            row |= {f'{key}_mean': about.mean, f'{key}_sd': about.sd, f'{key}_min': about.low, f'{key}_max': about.high}
        found = differences.get(arm.label)
        interval = (found and found.interval) or (math.nan, math.nan)
        row |= {
            'baseline': baseline.label, 'score': score.key, 'pairs': found.n if found else None,
            'difference': found.mean if found else None, 'difference_error': found.error if found else None,
            'difference_low': interval[0], 'difference_high': interval[1],
            'same_sign': found.same_sign if found else None, 'verdict': found.verdict if found else 'baseline',
            'verdict_bonferroni': found.strict_verdict if found else 'baseline',
        }  # fmt: skip
        rows.append(row)
    return rows


def _options(arm: Arm) -> Row:
    return {key: shown(value) if isinstance(value, tuple) else value for key, value in arm.options.items()}


def to_csv(rows: Sequence[Row]) -> str:
    """CSV with a header; missing numbers are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() else value
    return value


# ----- Markdown -----------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first ``left`` columns set left and the others right."""
    lines = [head, ['---' if column < left else '---:' for column in range(len(head))], *rows]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', r'\|') for cell in line) + ' |' for line in lines) + '\n'


def sizes(arms: Sequence[Arm]) -> str:
    """Parameters, operations, speed and state of every arm, and its runs."""
    lengths = sorted({arm.config.data.seq_len for arm in arms})
    trained = f'{lengths[0]}' if len(lengths) == 1 else 'trained length'
    head = (
        'arm', 'parameters', 'active', 'added', 'FLOPs/token', 'tokens/s', f'state at {trained}',
        f'state at {LONG_CONTEXT}', 'tokens seen', 'runs',
    )  # fmt: skip
    rows = []
    for arm in arms:
        costs = arm.costs
        counts = costs.counts
        rows.append((
            arm.label, f'{counts.total:,}', f'{counts.active:,}', f'{counts.added:,}', short(costs.flops_per_token),
            NONE if math.isnan(arm.tokens_per_second) else f'{arm.tokens_per_second:,.0f}', kibi(costs.state_bytes),
            kibi(costs.state_bytes_long), short(arm.tokens_seen), states(arm),
        ))  # fmt: skip
    return table(head, rows)


def options(arms: Sequence[Arm]) -> str:
    """The options in which the arms differ."""
    keys = list(arms[0].options)
    rows = [(arm.label, *(shown(arm.options[key]) for key in keys)) for arm in arms]
    return table(('arm', *keys), rows, left=1 + len(keys))


def finals(arms: Sequence[Arm], by_seed: str = 'loss') -> str:
    """Final scores of the finished runs, ``by_seed`` of every one; scores that no run has are left out.

    A score that older runs of an arm lack says how many runs it is from.
    """
    keys = [key for key in SCORES if any(arm.finals(key) for arm in arms)]
    head = ['arm', 'seeds']
    for key in keys:
        head += [SCORES[key], 'min to max']
    rows = []
    for arm in arms:
        row = [arm.label, str(len(arm.finished))]
        for key in keys:
            about = summary(arm.finals(key).values())
            of = f' (of {about.n})' if 0 < about.n < len(arm.finished) else ''
            row += [mean(about) + of, span(about)]
        each = ', '.join(f'{seed}: {value:.4f}' for seed, value in arm.finals(by_seed).items())
        rows.append([*row, each or NONE])
    return table([*head, f'{SCORES[by_seed]} by seed'], rows)


def unfinished(arms: Sequence[Arm]) -> str:
    """The newest evaluation of every run that is not done; empty when all are."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            if run.state == DONE:
                continue
            newest = run.evals[-1] if run.evals else None
            at = str(newest['step']) if newest else NONE
            scored = (at, *(fixed(number(newest, key)) for key in SCORES))
            made = f'{run.step} of {run.config.train.steps}'
            rows.append((arm.label, str(run.seed), run.state, made, *scored, stamp(run.last_time) or NONE))
    head = ('arm', 'seed', 'state', 'step', 'evaluated at', *SCORES.values(), 'last record')
    return table(head, rows, 3) if rows else ''


def differences(found: Mapping[str, Difference]) -> str:
    """Differences to the baseline, paired by seed."""
    rows = []
    for label, difference in found.items():
        interval = difference.interval
        side = 'lower' if difference.mean < 0 else 'higher'
        rows.append((
            label, str(difference.n), signed(difference.mean), fixed(difference.error),
            f'{signed(interval[0])} to {signed(interval[1])}' if interval else NONE,
            f'{difference.same_sign} of {difference.n} {side}' if difference.n else NONE,
            difference.verdict, difference.strict_verdict,
        ))  # fmt: skip
    percent = f'{100 * CONFIDENCE:.0f} %'
    head = ('arm', 'pairs', 'difference', 'standard error', f'{percent} interval', 'seeds', 'verdict', 'all together')
    return table(head, rows)


def caveats(found: Mapping[str, Difference], score: Score, baseline: Arm) -> str:
    """How to read the differences, with the numbers of this report."""
    with_interval = [difference for difference in found.values() if difference.interval]
    count = len(with_interval)
    text = (
        f"Differences are an arm's final {score.name} minus that of {baseline.label}, in {score.unit}, seed by seed;"
        f' {score.better} is better. *Resolved* ("lower", "higher") means that the {100 * CONFIDENCE:.0f} % t interval'
        ' of the mean difference leaves out 0. "Not resolved" does not mean equal: the interval says how large a'
        ' difference these seeds cannot exclude. The intervals speak of new seeds (initial values, data order) of these'
        ' very configurations on what was held out here, not of other hyperparameters, sizes or data, and assume'
        ' differences that are about normal, which so few seeds cannot check.\n'
    )
    if count > 1:
        pairs = min(difference.n for difference in with_interval)
        text += (
            f'\n**Multiple comparisons.** Each interval is for its comparison alone. Of {count} comparisons of arms'
            f' that do not differ, at least one would look resolved with a probability of up to'
            f' {100 * min(1.0, count * (1 - CONFIDENCE)):.0f} %. The column *all together* holds for all at once'
            f' (Bonferroni): with {pairs} pairs its intervals are'
            f' {t_factor(pairs, count) / t_factor(pairs):.1f} times as wide. Neither column corrects for arms that'
            ' were tried and not shown, or for having chosen the baseline after looking.\n'
        )
    return text


def lengths(arms: Sequence[Arm]) -> str:
    """Accuracy over the sequence length, mean and range over seeds; empty when no run has it."""
    tables = {arm.label: accuracies(arm) for arm in arms}
    columns = sorted({length for found, _ in tables.values() for length in found})
    if not columns:
        return ''
    rows = []
    for label, (found, final) in tables.items():
        if found:
            cells = (_with_range(summary(found.get(length, ()))) for length in columns)
            rows.append((label if final else f'{label} (unfinished)', *cells))
    return table(('arm', *map(str, columns)), rows)


def simpler_models(arms: Sequence[Arm]) -> str:
    """What simpler models reach on what was held out, if the runs agree on it; empty otherwise."""
    found = {
        tuple((key, number(record['baselines'], key)) for key in sorted(record['baselines']) if key in BASELINES)
        for arm in arms
        for run in arm.finished
        for record in run.records
        if 'baselines' in record
    }
    if len(found) != 1:
        return ''
    units = {'chance': 'accuracy', 'context': 'accuracy'}
    parts = [
        f'{BASELINES[key]} {value:.3f} ({units.get(key, "bits per byte")})'
        for key, value in found.pop()
        if math.isfinite(value)
    ]
    return f'For comparison: {", ".join(parts)}.\n' if parts else ''


def states(arm: Arm) -> str:
    return ', '.join(f'{count} {state}' for state, count in arm.states().items())


def mean(about: Summary) -> str:
    """Mean and sample standard deviation."""
    if not about.n:
        return NONE
    return fixed(about.mean) + ('' if math.isnan(about.sd) else f' ± {about.sd:.4f}')


def _with_range(about: Summary) -> str:
    """Mean of shares and, where they differ, smallest to largest."""
    low, high = fixed(about.low, 3), fixed(about.high, 3)
    return fixed(about.mean, 3) + (f' ({low} to {high})' if low != high else '')


def span(about: Summary) -> str:
    return f'{about.low:.4f} to {about.high:.4f}' if about.n > 1 else NONE


def fixed(value: float, digits: int = 4) -> str:
    return f'{value:.{digits}f}' if math.isfinite(value) else NONE


def signed(value: float) -> str:
    return f'{value:+.4f}' if math.isfinite(value) else NONE


def kibi(count: int) -> str:
    """Bytes in binary units."""
    size = float(count)
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if size < 1024 or unit == 'GiB':
            break
        size /= 1024
    return f'{size:.4g} {unit}'


def stamp(seconds: float) -> str:
    """A time in UTC; empty when there is none."""
    return datetime.fromtimestamp(seconds, UTC).strftime('%Y-%m-%d %H:%M:%S') if math.isfinite(seconds) else ''
