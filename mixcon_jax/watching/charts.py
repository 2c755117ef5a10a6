"""Curves and bars out of characters: Unicode's blocks and braille patterns."""

import itertools
import math
from collections.abc import Sequence

BARS = '▁▂▃▄▅▆▇█'
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell: left column from above, right column

Points = Sequence[Sequence[float]]  # (x, y) each, by x


def bars(values: Sequence[float], high: float) -> str:
    """One character a value, from 0 to ``high``; a blank where a value is not finite."""
    return ''.join(
        BARS[max(0, min(7, round(8 * value / high) - 1 if high > 0 else 0))] if math.isfinite(value) else ' '
        for value in values
    )


def sparkline(points: Points, width: int) -> str:
    """A curve in one line of at most ``width`` characters, from its least to its greatest value."""
    values = means([y for _, y in points], width)
    if not values:
        return ''
    low, high = min(values), max(values)
    scale = high - low or 1.0
    return ''.join(BARS[round(7 * (value - low) / scale)] for value in values)


def means(values: Sequence[float], count: int) -> list[float]:
    """At most ``count`` values: neighbours are averaged."""
    if len(values) <= count:
        return list(values)
    edges = [index * len(values) // count for index in range(count + 1)]
    return [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]


def span(points: Points, share: float = 0.95) -> tuple[float, float]:
    """Least and greatest value to draw: the greatest that ``share`` of them stay below, as losses begin far above."""
    values = sorted(y for _, y in points)
    low, high = values[0], values[min(len(values) - 1, int(share * len(values)))]
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def cell(
    x: float, y: float, xs: tuple[float, float], ys: tuple[float, float], width: int, height: int
) -> tuple[int, int]:
    """Column and row, row 0 above, of a point in a chart over the ranges ``xs`` and ``ys``; the nearest one outside."""
    column = (x - xs[0]) / ((xs[1] - xs[0]) or 1.0) * (width - 1)
    row = (ys[1] - y) / (ys[1] - ys[0]) * (height - 1)
    return round(min(max(column, 0), width - 1)), round(min(max(row, 0), height - 1))


def braille(points: Points, width: int, height: int, xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    """A curve of connected points in ``height`` lines of ``width`` characters, which have 2 x 4 dots each."""
    cells = [[0] * width for _ in range(height)]
    columns: dict[int, list[float]] = {}
    for x, y in points:
        columns.setdefault(cell(x, y, xs, ys, 2 * width, 4 * height)[0], []).append(y)
    course = [(column, sum(values) / len(values)) for column, values in sorted(columns.items())]
    before = None
    for column, value in course:
        at = (column, cell(0, value, xs, ys, 2 * width, 4 * height)[1])
        for x, y in _line(before or at, at):
            cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
        before = at
    return [''.join(chr(0x2800 + dots) for dots in row) for row in cells]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots from one to another."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        tuple(round(a + (b - a) * part / steps) for a, b in zip(start, end))  # type: ignore[misc]
        for part in range(steps + 1)
    ]
