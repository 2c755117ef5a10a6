"""Figures of a report as files: drawn without a display, with text as text, and the same bytes from the same runs."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mixcon_jax.reports import curves, points, style
from mixcon_jax.reports.arms import Arm
from mixcon_jax.reports.comparison import Difference, Score


def draw(
    arms: Sequence[Arm], baseline: Arm, score: Score, differences: Mapping[str, Difference]
) -> dict[str, dict[str, bytes]]:
    """Draws every figure that the runs have data for.

    Returns:
      ``{name: {'png': bytes, 'svg': bytes}}``.
    """
    with in_style():
        figures = {
            'loss-tokens': curves.losses(arms, curves.TOKENS, lambda arm: 1.0),
            'loss-flops': curves.losses(arms, curves.FLOPS, lambda arm: arm.costs.flops_per_token),
            'final': points.finals(arms, score),
            'differences': points.differences(arms, baseline, score, differences),
            'accuracy-by-length': curves.accuracy_by_length(arms),
        }
        return {name: {kind: render(one, kind) for kind in ('png', 'svg')} for name, one in figures.items() if one}


@contextlib.contextmanager
def in_style() -> Iterator[None]:
    """What is drawn and rendered inside looks as all our figures do, whatever a matplotlibrc says."""
    settings: dict[Any, Any] = {**mpl.rcParamsDefault, **style.RC}
    del settings['backend']
    with mpl.rc_context(settings):
        yield


def render(figure: Figure, kind: str) -> bytes:
    """The file of a figure, 'png' or 'svg'; the same bytes each time."""
    buffer = io.BytesIO()
    metadata = {'Software': None} if kind == 'png' else {'Date': None, 'Creator': None}
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()
