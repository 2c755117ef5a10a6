"""``mixcon watch``: runs in the terminal, as they train. A table of all of them, and one in detail."""

import contextlib
import io
import signal
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mixcon_jax.errors import UserError
from mixcon_jax.runs.mark import path_of
from mixcon_jax.units import short
from mixcon_jax.watching.cells import COLORS, newest, percent, progress, status_cell, time_left, titles
from mixcon_jax.watching.details import details
from mixcon_jax.watching.follow import Runs, WatchedRun

ACTIVE = ('starting', 'running', 'silent')
LONGEST = 24 * 3600  # seconds between two looks
FEW = 8  # runs up to which one of them is always shown in detail
CHART = (4, 10)  # least and greatest height of the loss chart


def watch(roots: Sequence[str], once: bool = False, interval: float = 2.0, console: Console | None = None) -> int:
    """Shows the runs below some folders until Ctrl-C; once, when asked to or when the output is not a terminal.

    Args:
      roots: folders; runs are looked for in all of them, at any depth.
      once: print one snapshot.
      interval: seconds between two looks at the files.
      console: where to; None means standard output.

    Returns:
      The exit code, 0.

    Raises:
      UserError: a snapshot is wanted and there is no run, or an argument is wrong.
    """
    if not interval >= 0.1:
        raise UserError(f'--interval {interval:g} must be at least 0.1 seconds')
    if interval > LONGEST:
        raise UserError(f'--interval {interval:g} must be at most {LONGEST} seconds, a day')
    for root in roots:
        if path_of(root, 'DIR').is_file():
            raise UserError(f'{root} is a file; name the folder of a run, or one that holds runs')
    console, runs, where = console or Console(), Runs(roots), ', '.join(roots)
    if once or not console.is_terminal or console.is_dumb_terminal:
        found = runs.update()
        if not found:
            raise UserError(
                f'no run in {where}: a run is a folder with metrics.jsonl, or with config.json and checkpoints'
            )
        console.print(view(found, time.time(), console.width))
        return 0
    shown: WatchedRun | None = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else a killed process leaves no cursor behind
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            found, now = runs.update(), time.time()
            picture: RenderableType = Text(f'no run in {where} yet; waiting for one (Ctrl-C ends)')
            if found:
                shown = most_active(found, now, shown)
                picture = view(found, now, console.width, console.height, shown)
            live.update(picture, refresh=True)
            time.sleep(interval)
    return 0


def most_active(runs: Sequence[WatchedRun], now: float, shown: WatchedRun | None = None) -> WatchedRun:
    """The run to show in detail: the one shown so far while it runs, else the running one with the newest record."""
    if shown is not None and shown in runs and shown.status(now) in ('starting', 'running'):
        return shown
    return max(runs, key=lambda run: (run.status(now) in ('starting', 'running'), run.seen))


def view(
    runs: Sequence[WatchedRun], now: float, width: int, height: int | None = None, shown: WatchedRun | None = None
) -> RenderableType:
    """The whole dashboard: the table of several runs, and one in detail where there is room or there are few.

    Args:
      runs: at least one.
      now: seconds since 1970.
      width: columns there are.
      height: lines there are; None means no end of them.
      shown: the run to show in detail; None takes the most active one.
    """
    shown = shown or most_active(runs, now)
    runs = sorted(runs, key=lambda run: run.status(now) not in ACTIVE)
    if height is None and len(runs) > FEW:
        return overview(runs, now, width)
    table = [overview(runs, now, width, shown=shown)] if len(runs) > 1 else []
    if height is None:
        return Group(*table, details(shown, now, width, CHART[1]))
    least = Group(*table, details(shown, now, width, CHART[0]))
    spare = height - _lines(least, width)
    if spare < 0:
        return least if len(runs) <= FEW else overview(runs, now, width, height)
    return Group(*table, details(shown, now, width, min(CHART[0] + spare, CHART[1])))


# ----- all runs -----------------------------------------------------------------------------------------------------


def overview(
    runs: Sequence[WatchedRun], now: float, width: int, height: int | None = None, shown: WatchedRun | None = None
) -> RenderableType:
    """A line for each run; what does not fit is left out: the least important columns, the last rows."""
    rows = runs if height is None or len(runs) + 2 <= height else runs[: max(1, height - 3)]
    names = [f'{name} ◂' if run is shown else name for run, name in zip(rows, titles(runs))]
    columns = [  # title, importance, cells
        ('run', 0, [Text(name) for name in names]),
        ('seed', 2, [Text(str(run.option('seed', ''))) for run in rows]),
        ('state', 0, [status_cell(run, now) for run in rows]),
        ('step', 1, [Text(f'{run.step}/{run.steps or "?"}') for run in rows]),
        ('', 7, [progress(run) for run in rows]),
        ('loss', 3, [newest(run.train, 'loss', '{:.4f}'.format) for run in rows]),
        ('held out', 4, [newest(run.scores, 'loss', '{:.4f}'.format) for run in rows]),
        ('tokens/s', 6, [newest(run.train, 'tokens_per_second', short) for run in rows]),
        ('left', 5, [Text(time_left(run, now)) for run in rows]),
        ('goodput', 8, [newest(run.train, 'goodput', percent) for run in rows]),
        ('MFU', 9, [newest(run.train, 'mfu', percent) for run in rows]),
    ]
    if not any('mfu' in (run.train or {}) for run in runs):
        columns.pop()
    widths = [max(len(title), *(cell.cell_len for cell in cells)) + 2 for title, _, cells in columns]
    least = [min(widths[0], 14), *widths[1:]]  # names may be cut
    kept = sorted(range(len(columns)), key=lambda index: columns[index][1])
    while len(kept) > 3 and sum(least[index] for index in kept) > width:
        kept.pop()
    room = max(least[0], width - sum(widths[index] for index in kept if index))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style='bold')
    for index in sorted(kept):
        justify: Any = 'left' if index in (0, 2, 4) else 'right'
        most = room - 2 if index == 0 else None
        table.add_column(columns[index][0], justify=justify, no_wrap=True, overflow='ellipsis', max_width=most)
    for row in range(len(rows)):
        table.add_row(*(columns[index][2][row] for index in sorted(kept)))
    more = [Text(f'and {len(runs) - len(rows)} more', 'dim')] if len(rows) < len(runs) else []
    return Group(_counts(runs, now), table, *more)


def _counts(runs: Sequence[WatchedRun], now: float) -> Text:
    """How many runs there are of each status."""
    statuses = [run.status(now) for run in runs]
    clock = time.strftime('%H:%M:%S', time.localtime(now))
    parts = [(f'{statuses.count(each)} {each}', color) for each, color in COLORS.items() if each in statuses]
    return Text('  ').join([Text(clock, 'dim'), *(Text(*part) for part in parts)])


def _lines(renderable: RenderableType, width: int) -> int:
    """How many lines it takes."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    return len(console.render_lines(renderable, console.options, pad=False))
