"""Curves of a report: loss over a training, accuracy over the length of the sequence."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mixcon_jax.reports import style
from mixcon_jax.reports.arms import Arm
from mixcon_jax.reports.comparison import summary
from mixcon_jax.reports.runs import ReportedRun, number
from mixcon_jax.runs.records import Record
from mixcon_jax.units import short

TOKENS, FLOPS = 'training tokens', 'training FLOPs'
FEW_EVALS = 4  # with fewer of them in every run, the training loss is drawn beside them
SMOOTHING = 20  # the training loss is averaged over this fraction of a run
Curve = dict[int, tuple[float, float]]  # {step: (tokens, loss)}


# ----- loss ---------------------------------------------------------------------------------------------------------


def losses(arms: Sequence[Arm], name: str, factor: Callable[[Arm], float]) -> Figure | None:
    """Held-out loss against training tokens times ``factor``; beside it the training loss where evaluations are few."""
    longest = max(len(heldout(run)) for arm in arms for run in arm.runs)
    few = longest < FEW_EVALS and any(run.train for arm in arms for run in arm.runs)
    if not longest and not few:
        return None
    figure, axes = style.figure((8.6 if few else 5.6) + style.room(arms), style.height(arms), 2 if few else 1)
    _curves(axes[0], arms, heldout, name, factor)
    axes[0].set_ylabel('held-out loss (nats per token)')
    if few:
        _curves(axes[1], arms, training, name, factor)
        axes[1].set_ylabel('training loss, smoothed (nats per token)')
        axes[1].yaxis.set_tick_params(labelleft=True)
    open_ends = any(run.final is None and heldout(run) for arm in arms for run in arm.runs)
    style.legend(figure, arms, 'unfinished run' if open_ends else '')
    return figure


def _curves(
    axes: Axes, arms: Sequence[Arm], of: Callable[[ReportedRun], Curve], name: str, factor: Callable[[Arm], float]
):
    """Every run a thin line, an unfinished one with a hollow end; their mean a thick line with markers."""
    largest, smallest = 0.0, math.inf
    for index, arm in enumerate(arms):
        look, unit = style.look(index), factor(arm)
        for run in arm.runs:
            if not (curve := of(run)):
                continue
            x, y = (np.array(values) for values in zip(*curve.values()))
            largest, smallest = max(largest, unit * x.max()), min(smallest, unit * x.min())
            if len(arm.runs) > 1:
                axes.plot(unit * x, y, ls=look.line, lw=0.6, color=look.color, alpha=0.45)
            if run.final is None:
                axes.plot(unit * x[-1:], y[-1:], look.marker, ms=5, mfc='white', mec=look.color, zorder=4)
        if common := mean(arm, of):
            x, y = (np.array(values) for values in zip(*common.values()))
            every = max(1, len(x) // 10)
            axes.plot(unit * x, y, ls=look.line, color=look.color, marker=look.marker, ms=3.5, markevery=every)
    axes.set_xlabel(name)
    if largest > 100 * smallest > 0 and of is heldout:
        axes.set_xscale('log')
    elif largest:
        axes.set_xlim(left=0)
        _powers(axes, name, largest)


def _powers(axes: Axes, name: str, largest: float) -> None:
    """Ticks of tokens as 200k or 3M, of other numbers with their power of ten in the label."""
    if name == TOKENS:
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
    else:
        power = 3 * (math.floor(math.log10(largest)) // 3)
        axes.xaxis.set_major_formatter(lambda value, _: f'{value / 10**power:g}')
        axes.set_xlabel(f'{name} ($10^{{{power}}}$)')


def heldout(run: ReportedRun) -> Curve:
    """The evaluations during the run; of a run without any, the final one."""
    scored: tuple[Record, ...] = run.evals or ((run.final,) if run.final else ())
    loss = {record['step']: number(record, 'loss') for record in scored}
    return {step: (run.tokens_at(step), value) for step, value in loss.items() if math.isfinite(value)}


def training(run: ReportedRun) -> Curve:
    """The training loss, each value the mean over the last twentieth of the run's records."""
    good = [record for record in run.train if math.isfinite(number(record, 'loss'))]
    width = max(1, len(good) // SMOOTHING)
    sums = np.concatenate([[0.0], np.cumsum([number(record, 'loss') for record in good])])
    curve = {}
    for end, record in enumerate(good, 1):
        begin = max(0, end - width)
        curve[record['step']] = (run.tokens_at(record['step']), float(sums[end] - sums[begin]) / (end - begin))
    return curve


def mean(arm: Arm, of: Callable[[ReportedRun], Curve]) -> Curve:
    """The mean over the finished runs, or over all while none is, at the steps that all of them have."""
    curves = [curve for run in arm.finished or arm.runs if (curve := of(run))]
    shared = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    at = {step: np.mean([curve[step] for curve in curves], axis=0) for step in sorted(shared)}
    return {step: (float(values[0]), float(values[1])) for step, values in at.items()}


# ----- accuracy by length -------------------------------------------------------------------------------------------


def by_length(record: Record | None) -> dict[int, float]:
    """``{length: accuracy}`` of a record's ``by_length``; empty where it has none."""
    table = (record or {}).get('by_length')
    if not isinstance(table, dict):
        return {}
    found = {
        int(length): number(s, 'accuracy') for length, s in table.items() if length.isdecimal() and type(s) is dict
    }
    return {length: accuracy for length, accuracy in sorted(found.items()) if math.isfinite(accuracy)}


def accuracies(arm: Arm) -> tuple[dict[int, list[float]], bool]:
    """``{length: accuracy of each run}`` and whether they are final; the newest evaluations while no run is done."""
    finals = [by_length(run.final) for run in arm.finished]
    final = any(finals)
    tables = finals if final else [by_length(run.evals[-1]) for run in arm.runs if run.evals]
    lengths = sorted({length for table in tables for length in table})
    return {length: [table[length] for table in tables if length in table] for length in lengths}, final


def accuracy_by_length(arms: Sequence[Arm]) -> Figure | None:
    """Accuracy over the length of the sequence: the mean over seeds, smallest to largest as a band."""
    tables = [accuracies(arm) for arm in arms]
    if not any(found for found, _ in tables):
        return None
    figure, (axes,) = style.figure(5.6 + style.room(arms), style.height(arms))
    for index, (found, final) in enumerate(tables):
        if not found:
            continue
        look, lengths = style.look(index), list(found)
        about = [summary(values) for values in found.values()]
        axes.fill_between(lengths, [s.low for s in about], [s.high for s in about], color=look.color, alpha=0.15, lw=0)
        fill = look.color if final else 'white'
        means = [s.mean for s in about]
        axes.plot(lengths, means, ls=look.line, color=look.color, marker=look.marker, ms=4, mfc=fill)
    axes.set_xscale('log', base=2)
    ticks = sorted({length for found, _ in tables for length in found})
    if len(ticks) <= 12:
        axes.set_xticks(ticks, [str(length) for length in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    trained = sorted({arm.config.data.seq_len for arm in arms})
    for length in trained:
        axes.axvline(length, color=style.GRAY, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.set(xlabel='sequence length (tokens)', ylabel='accuracy', ylim=(-0.03, 1.03))
    named = ', '.join(map(str, trained))
    style.note(axes, f'lines: mean over seeds · bands: smallest to largest · dashed: trained length {named}')
    running = any(found and not final for found, final in tables)
    style.legend(figure, arms, 'no run done yet' if running else '')
    return figure
