"""Points of a report: final scores of every seed, and paired differences with their intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from mixcon_jax.reports import style
from mixcon_jax.reports.arms import Arm, numeric_axis
from mixcon_jax.reports.comparison import Difference, Score, summary


def finals(arms: Sequence[Arm], score: Score) -> Figure | None:
    """Every finished run a dot, their mean with the standard deviation: over the swept number, or one row an arm."""
    done = [arm for arm in arms if arm.finals(score.key)]
    if not done:
        return None
    key, label = numeric_axis(arms), f'final {score.name} ({score.unit})'
    if key is not None:
        return _over_numbers(done, key, score, label)
    figure, axes = _rows(done, label)
    for row, arm in enumerate(done):
        scores = list(arm.finals(score.key).values())
        about = summary(scores)
        _row(axes, row, style.look(arms.index(arm)), scores, about.mean, about.sd, filled=True)
    style.note(axes, 'dots: seeds · bars: mean ± standard deviation')
    return figure


def _over_numbers(done: Sequence[Arm], key: str, score: Score, label: str) -> Figure:
    """One line through the arms' means, over the option in which they differ."""
    figure, (axes,) = style.figure(5.2, 3.4)
    places = [float(arm.options[key]) for arm in done]
    scores = [list(arm.finals(score.key).values()) for arm in done]
    about = [summary(values) for values in scores]
    color = style.COLORS[0]
    spread = [0.0 if math.isnan(one.sd) else one.sd for one in about]
    axes.errorbar(places, [one.mean for one in about], yerr=spread, fmt='D-', ms=4.5, lw=1, capsize=3, color=color)
    for place, values in zip(places, scores):
        if len(values) > 1:
            axes.plot([place] * len(values), values, 'o', ms=4.5, mfc='none', mec=color, mew=0.8, zorder=4)
    axes.set(xlabel=key, ylabel=label)
    _number_axis(axes, places)
    style.note(axes, 'circles: seeds · bars: mean ± standard deviation')
    return figure


def differences(arms: Sequence[Arm], baseline: Arm, score: Score, found: Mapping[str, Difference]) -> Figure | None:
    """Paired differences with their intervals, one row an arm; hollow where the interval includes 0 or is missing."""
    shown = [arm for arm in arms if arm.label in found and found[arm.label].n]
    if not shown:
        return None
    label = f'difference in {score.name} to {baseline.label} ({score.unit})'
    figure, axes = _rows(shown, style.literal(label, 72))
    axes.axvline(0, color=style.GRAY, lw=1, zorder=1)
    for row, arm in enumerate(shown):
        one = found[arm.label]
        half = one.interval[1] - one.mean if one.interval else math.nan
        values, filled = list(one.by_seed.values()), one.verdict in ('lower', 'higher')
        _row(axes, row, style.look(arms.index(arm)), values, one.mean, half, filled)
    side = 'left' if score.better == 'negative' else 'right'
    style.note(axes, f'dots: seeds · bars: mean and 95 % t interval · hollow: not resolved · {side} is better')
    return figure


def _rows(arms: Sequence[Arm], label: str) -> tuple[Figure, Axes]:
    """Axes with one row an arm, the first on top."""
    figure, (axes,) = style.figure(5.4 + style.room(arms), 1.1 + 0.4 * len(arms))
    axes.set_yticks(range(len(arms)), [style.literal(arm.label) for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(visible=False, axis='y')
    axes.set_xlabel(label)
    return figure, axes


def _row(
    axes: Axes, row: int, look: style.Look, values: Sequence[float], mean: float, half: float, filled: bool
) -> None:
    """The mean and, under it, the seeds' values one under the other; of one value the mean alone."""
    if len(values) > 1:
        row_of = row + np.linspace(0.16, 0.36, len(values))
        axes.plot(values, row_of, 'o', ms=4, color=look.color, alpha=0.4, mew=0)
    bars: dict[str, Any] = {} if math.isnan(half) else {'xerr': half}
    fill = look.color if filled else 'white'
    axes.errorbar(
        mean, row - 0.08, **bars, fmt=look.marker, ms=5, capsize=4, color=look.color, mfc=fill, mec=look.color, zorder=4
    )


def _number_axis(axes: Axes, values: Sequence[float]) -> None:
    """Ticks where the arms are; logarithmic when they spread over more than a factor of eight."""
    if values[0] > 0 and values[-1] > 8 * values[0]:
        axes.set_xscale('log')
    if len(values) <= 10:
        axes.set_xticks(values, [f'{value:g}' for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
