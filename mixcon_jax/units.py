"""Numbers and times in a few characters, and tables of them, for people."""

import math
from collections.abc import Sequence


def short(number: float) -> str:
    """A number in three digits: 12.3k, 4.56M."""
    rounded = float(f'{number:.3g}')
    for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
        if abs(rounded) >= size:
            return f'{rounded / size:g}{unit}'
    return f'{rounded:g}'


def memory(size: float) -> str:
    """Bytes in three digits or so: 65.5 GiB, 800 MiB."""
    for unit, factor in (('TiB', 2**40), ('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
        if size >= factor:
            return f'{size / factor:.{2 if size < 10 * factor else 1 if size < 100 * factor else 0}f} {unit}'
    return f'{size:.0f} B'


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 42s, 3m 05s, 2h 10m, 4d 03h; a dash if they are not finite."""
    if not math.isfinite(seconds):
        return '–'
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m {seconds % 60:02d}s'
    if seconds < 86400:
        return f'{seconds // 3600}h {seconds % 3600 // 60:02d}m'
    return f'{seconds // 86400}d {seconds % 86400 // 3600:02d}h'


def columns(lines: Sequence[Sequence[str]], left: int | None = None) -> str:
    """Lines of cells in columns, of which the first ``left``, or all, begin at one place and the others end at one."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = (
        [cell.ljust(w) if left is None or i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        for line in lines
    )
    return '\n'.join('  '.join(row).rstrip() for row in cells)
