"""What there is to say about a run in a few characters: cells of the tables of ``mixcon watch``."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mixcon_jax.units import duration
from mixcon_jax.watching.follow import WatchedRun, number

COLORS = {
    'starting': 'blue', 'running': 'green', 'silent': 'yellow', 'stopped': 'magenta', 'aborted': 'red', 'done': 'bold',
    'unfinished': 'magenta', 'made': 'cyan', 'unreadable': 'red',
}  # fmt: skip


def titles(runs: Sequence[WatchedRun]) -> list[str]:
    """The name of each run; the folder where it has none or another run has the same name and seed."""
    keys = [(run.option('name', ''), run.option('seed')) for run in runs]
    return [str(key[0]) if key[0] and keys.count(key) == 1 else str(run.path) for run, key in zip(runs, keys)]


def status_cell(run: WatchedRun, now: float) -> Text:
    """Its status; of a silent run with the time since its newest record."""
    status = run.status(now)
    return Text(f'silent for {duration(now - run.seen)}' if status == 'silent' else status, COLORS.get(status, ''))


def progress(run: WatchedRun, width: int = 10) -> Text:
    """A bar of the share of the steps that have been made."""
    done = min(width, width * run.step // run.steps) if run.steps else 0
    return Text('━' * done, 'green') + Text('━' * (width - done), 'bright_black')


def newest(record: Mapping[str, Any] | None, key: str, words: Callable[[float], str]) -> Text:
    """A number of a record; a dash where there is none yet, and in red where it is not finite."""
    if record is None or key not in record:
        return Text('–', 'dim')
    value = number(record[key])
    return Text(words(value)) if math.isfinite(value) else Text('nan', 'bold red')


def time_left(run: WatchedRun, now: float) -> str:
    """Time to the last step; how long a run took that is done."""
    if run.status(now) == 'done' and run.seconds:
        return f'({duration(run.seconds)})'
    seconds = run.seconds_left(now)
    return '–' if seconds is None else duration(seconds)


# ----- tables -------------------------------------------------------------------------------------------------------


def grid(rows: Sequence[Sequence[str | Text]], width: int, right: Sequence[int] = ()) -> Table:
    """Cells in columns, of which the last takes what is left of the width."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in range(len(rows[0])):
        last = column == len(rows[0]) - 1
        most = room_beside([row[:-1] for row in rows], width) if last else None
        justify: Any = 'right' if column in right else 'left'
        table.add_column(justify=justify, no_wrap=True, overflow='ellipsis', max_width=most)
    for row in rows:
        table.add_row(*row)
    return table


def room_beside(rows: Sequence[Sequence[str | Text]], width: int) -> int:
    """Columns that are left beside these cells, which have two blanks between them."""
    return max(1, width - sum(2 + max(len(row[column]) for row in rows) for column in range(len(rows[0]))))


# ----- words --------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share in percent: three digits below ten, else none behind the point."""
    return f'{100 * share:.1f} %' if 0 < share < 0.0995 else f'{100 * share:.0f} %'
