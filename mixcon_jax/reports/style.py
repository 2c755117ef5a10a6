"""How the figures of a report look, alike in all of them."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mixcon_jax.reports.arms import Arm

# Okabe and Ito's colours, which stay apart for the colour-blind; their yellow is too faint on white.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
LINES = ('-', '--', '-.', (0, (1, 1.2)))
GRAY = '#555555'
LABEL = 36  # characters in a line of a label
RC: dict[str, Any] = {
    'font.family': 'sans-serif', 'font.sans-serif': ['DejaVu Sans'], 'font.size': 9, 'axes.titlesize': 9,
    'legend.fontsize': 8, 'legend.frameon': False, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.grid': True, 'grid.color': '#e6e6e6', 'grid.linewidth': 0.6, 'axes.axisbelow': True, 'lines.linewidth': 1.5,
    'figure.constrained_layout.use': True, 'svg.fonttype': 'none', 'svg.hashsalt': 'mixcon', 'savefig.dpi': 200,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Look:
    """How an arm looks in every figure."""

    color: str
    marker: str
    line: str | tuple


def look(index: int) -> Look:
    """Of the arm with this place in the report; 28 differ."""
    return Look(COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)], LINES[index % len(LINES)])


def figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches that needs no display, with its axes side by side."""
    drawn = Figure(figsize=(width, height))
    FigureCanvasAgg(drawn)
    return drawn, list(np.atleast_1d(drawn.subplots(1, columns, sharey=True)))


def literal(label: str, width: int = LABEL) -> str:
    """A label in lines of at most ``width`` characters, which Matplotlib does not take for a formula."""
    return '\n'.join(textwrap.wrap(label, width) or ['']).replace('$', r'\$')


def room(arms: Sequence[Arm]) -> float:
    """Inches that the longest of the arms' labels needs."""
    return 0.075 * max(len(line) for arm in arms for line in literal(arm.label).split('\n'))


def height(arms: Sequence[Arm]) -> float:
    """Inches of a figure beside which the arms' names fit."""
    lines = sum(1 + literal(arm.label).count('\n') for arm in arms)
    return max(3.4, 0.6 + 0.17 * (lines + len(arms) / 3))


def note(axes: Axes, text: str) -> None:
    """How to read the axes, above them."""
    axes.set_title(text, fontsize=7.5, color=GRAY, loc='left')


def legend(drawn: Figure, arms: Sequence[Arm], unfinished: str) -> None:
    """The arms' names, right of the axes, where they cover nothing; hollow markers are explained as ``unfinished``."""
    handles = []
    for index, arm in enumerate(arms):
        one = look(index)
        handles.append(
            Line2D([], [], ls=one.line, color=one.color, marker=one.marker, ms=3.5, label=literal(arm.label))
        )
    if unfinished:
        handles.append(Line2D([], [], ls='', marker='o', ms=5, mfc='white', mec=GRAY, label=unfinished))
    labels = [str(handle.get_label()) for handle in handles]
    drawn.legend(handles, labels, loc='outside right upper', handlelength=2.8)
