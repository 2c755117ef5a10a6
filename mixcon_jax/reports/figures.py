"""Figures of a report as files: drawn without a display, with text as text, and the same bytes from the same runs."""

import io
from collections.abc import Mapping, Sequence
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
    settings: dict[Any, Any] = {**mpl.rcParamsDefault, **style.RC}  # whatever a matplotlibrc says
    del settings['backend']
    with mpl.rc_context(settings):
        figures = {
            'loss-tokens': curves.losses(arms, curves.TOKENS, lambda arm: 1.0),
            'loss-flops': curves.losses(arms, curves.FLOPS, lambda arm: arm.costs.flops_per_token),
            'final': points.finals(arms, score),
            'differences': points.differences(arms, baseline, score, differences),
            'accuracy-by-length': curves.accuracy_by_length(arms),
        }
        return {name: {kind: _render(one, kind) for kind in ('png', 'svg')} for name, one in figures.items() if one}


def _render(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {'Software': None} if kind == 'png' else {'Date': None, 'Creator': None}
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()
