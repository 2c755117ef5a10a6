"""One run in detail: loss over steps, other numbers, where time goes, and what its layers report."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mixcon_jax.models.pattern import statistics
from mixcon_jax.options import Statistic
from mixcon_jax.units import short
from mixcon_jax.watching import charts
from mixcon_jax.watching.cells import grid, newest, percent, progress, room_beside, status_cell, time_left, titles
from mixcon_jax.watching.follow import WatchedRun, number

SHARES = {
    'goodput': ('steps', 'green'), 'startup': ('start-up', 'blue'), 'compile': ('compile', 'magenta'),
    'data': ('data', 'red'), 'checkpoint': ('checkpoint', 'yellow'), 'evaluation': ('evaluation', 'cyan'),
}  # fmt: skip
BESIDE = ('aside', 'exception')  # forms of statistics that stand beside the bars of their title
FEW = 8  # layers that are shown one by one
SIDE_BY_SIDE = 120  # columns from which on the model's statistics stand beside the chart


def details(run: WatchedRun, now: float, width: int, chart: int) -> RenderableType:
    """One run: loss over steps in ``chart`` lines, other numbers, where time goes, what its layers report."""
    title = Text.assemble((titles([run])[0], 'bold'), f' · seed {run.option("seed", "?")} · {run.path}')
    head = Text(f'step {run.step}/{run.steps or "?"} ', no_wrap=True) + progress(run) + ' ' + status_cell(run, now)
    head.append(
        f'  {run.option("model.num_blocks", 1)} x ({_pattern(run)}), width {run.option("model.dim", "?")}', 'dim'
    )
    head.truncate(width, overflow='ellipsis')
    stats = run.train.get('stats') if run.train else None
    layers = per_layer(stats if isinstance(stats, dict) else {}, len(run.option('model.pattern', [])))
    halves = width // 2 - 2 if width >= SIDE_BY_SIDE and layers else width
    why: list[RenderableType] = [Text(run.unreadable, 'red')] if run.unreadable else []
    if run.made_of:
        why = [Text(f'made of {run.made_of}, not trained since', 'cyan')]
    left = [*why, *_chart(run, halves, chart), _numbers(run, now, halves), _time(run, halves)]
    declared = statistics(run.option('model.pattern', []), run.option('model.layers', {}))
    right = reported(layers, declared, halves)
    if halves == width:
        return Group(Rule(title, align='left'), head, *left, *right)
    panes = Table.grid(padding=(0, 4, 0, 0))
    panes.add_column(width=halves)
    panes.add_column()
    panes.add_row(Group(*left), Group(*right))
    return Group(Rule(title, align='left'), head, panes)


def _pattern(run: WatchedRun) -> str:
    """The layers of a block, neighbours that are alike told once."""
    groups = [(layer, len(list(group))) for layer, group in itertools.groupby(run.option('model.pattern', []))]
    return ', '.join(f'{count} {layer}' if count > 1 else str(layer) for layer, count in groups)


def _chart(run: WatchedRun, width: int, height: int) -> list[RenderableType]:
    """Training loss as a line, held-out scores as points on it."""
    points, scores = run.curves['loss'].points, run.curves['heldout'].points
    if not points and not scores:
        return [Text('no loss was finite' if run.train else 'no step has been recorded yet', 'dim')]
    drawn = [*points, *scores]
    xs, ys = (min(x for x, _ in drawn), max(*(x for x, _ in drawn), run.step)), charts.span(drawn)
    room = max(10, width - 8)
    lines = [Text(line, 'cyan') for line in charts.braille(points, room, height, xs, ys)]
    for x, y in scores:
        column, row = charts.cell(x, y, xs, ys, room, height)
        lines[row] = Text.assemble(lines[row][:column], Text('●', 'yellow'), lines[row][column + 1 :])
    labels = [f'{_label(ys[1]):>7} ', *[' ' * 8] * (height - 2), f'{_label(ys[0]):>7} ']
    ends = f'{xs[0]:.0f}', f'step {xs[1]:.0f}'
    legend = Text.assemble(('─', 'cyan'), ' loss  ', ('●', 'yellow'), ' held out')
    gap = room - legend.cell_len - sum(map(len, ends))
    foot = Text.assemble(' ' * 8, ends[0], ' ' * max(1, gap // 2), legend, ' ' * max(1, gap - gap // 2), ends[1])
    foot.truncate(width)
    return [*(Text.assemble((label, 'dim'), line) for label, line in zip(labels, lines)), foot]


def _label(y: float) -> str:
    """In seven columns."""
    return f'{y:.3f}' if abs(y) < 1000 else f'{y:.1e}'


def _numbers(run: WatchedRun, now: float, width: int) -> RenderableType:
    """The newest values, with their course where one is kept."""
    train, scores = run.train or {}, run.scores or {}
    rows: list[list[str | Text]] = [['loss', newest(train, 'loss', '{:.4f}'.format), '']]
    if scores:
        key, words = 'bits_per_byte', '{:.4f} bits per byte'.format
        if scores.get(key) is None:  # a task, which has no bytes
            key, words = 'accuracy', 'accuracy {:.4f}'.format
        more = newest(scores, key, words) + f' at step {scores["step"]}'
        rows.append(['held out', newest(scores, 'loss', '{:.4f}'.format), more])
    for key, name in (('learning_rate', 'learning rate'), ('grad_norm', 'gradient norm')):
        line = charts.sparkline(run.curves[key].points, max(8, min(40, width - 28)))
        rows.append([name, newest(train, key, '{:.3g}'.format), Text(line, 'cyan')])
    seen = f'{short(number(train["tokens_seen"]))} seen' if 'tokens_seen' in train else ''
    rows.append(['tokens/s', newest(train, 'tokens_per_second', short), seen])
    if 'mfu' in train:
        rows.append(['MFU', newest(train, 'mfu', percent), f'{short(number(train.get("flops_per_second")))} FLOP/s'])
    name = 'took' if run.status(now) == 'done' else 'time left'
    kept = f'checkpoint at step {run.last_saved}' if run.last_saved else ''
    rows.append([name, Text(time_left(run, now).strip('()')), kept])
    if train.get('skipped'):
        bad = f'not finite; {train.get("bad_steps", 0)} in a row now'
        rows.append(['skipped steps', Text(str(train['skipped']), 'bold red'), bad])
    return grid(rows, width, right=(1,))


def _time(run: WatchedRun, width: int) -> RenderableType:
    """What this start's wall time went into, as one bar with its legend."""
    train = run.train or {}
    shares = {'goodput': train.get('goodput')} | (train.get('time_shares') or {})
    parts = [(*SHARES[key], number(shares[key])) for key in SHARES if number(shares.get(key)) >= 0.005]
    bar = Text(no_wrap=True)
    for _, color, share in parts:
        bar.append('█' * max(1, round(share * width)), color)
    bar.truncate(width)
    legend = [Text.assemble(('■ ', color), f'{name} {percent(share)}') for name, color, share in parts]
    return Group(bar, Columns(legend, padding=(0, 2))) if parts else Text('')


# ----- the model's own statistics ------------------------------------------------------------------------------------


def per_layer(stats: Mapping[str, Any], pattern: int) -> dict[int, dict[str, Any]]:
    """Statistics by layer, counted through all blocks: a record has ``layer_j/name``, a list over blocks.

    Args:
      stats: of a record.
      pattern: layers of one block.
    """
    layers: dict[int, dict[str, Any]] = {}
    for key, blocks in stats.items():
        layer, _, name = key.removeprefix('layer_').partition('/')
        if layer.isdecimal() and name and isinstance(blocks, list):
            for block, value in enumerate(blocks):
                layers.setdefault(block * pattern + int(layer), {})[name] = value
    return dict(sorted(layers.items()))


def reported(
    layers: Mapping[int, Mapping[str, Any]], declared: Mapping[str, Statistic], width: int
) -> list[RenderableType]:
    """Tables of what the layers report, bars first: one a title, in the order of the layers' declarations."""
    found = dict.fromkeys(name for values in layers.values() for name in values)
    tables: dict[str, dict[str, Statistic]] = {}
    for name in [*(name for name in declared if name in found), *(name for name in found if name not in declared)]:
        statistic = declared.get(name, Statistic(''))
        tables.setdefault(statistic.title, {})[name] = statistic
    bars, columns = [], []
    for title, group in tables.items():
        for name, statistic in group.items():
            if statistic.form == 'shares':
                bars += shares(title, name, group, layers, width)
        columns += numbers(title, {key: each for key, each in group.items() if each.form == 'number'}, layers)
    return [*bars, *columns]


def shares(
    title: str,
    name: str,
    together: Mapping[str, Statistic],
    layers: Mapping[int, Mapping[str, Any]],
    width: int,
) -> list[RenderableType]:
    """A layer's shares as bars, as of the load of its experts; of many layers those whose shares are least even.

    Args:
      title: of the table.
      name: of the statistic.
      together: the statistics of the title, of which some stand beside the bars.
      layers: the values by layer and name.
      width: characters.
    """
    parts = {
        layer: [number(share) for share in values[name]]
        for layer, values in layers.items()
        if isinstance(values.get(name), list) and values[name]
    }
    if not parts:
        return []
    worst = sorted(sorted(parts, key=lambda layer: -max(parts[layer]) * len(parts[layer]))[:FEW])
    rows: list[list[str | Text]] = []
    for layer in worst:
        words = [f'{percent(min(parts[layer]))} to {percent(max(parts[layer]))}']
        words += [_beside(other, layers[layer].get(key)) for key, other in together.items() if other.form in BESIDE]
        rows.append([f'layer {layer}', *words])
    room = room_beside(rows, width)
    rows = [[*row, _bars(parts[layer], room)] for row, layer in zip(rows, worst)]
    counts = {len(load) for load in parts.values()}
    even = f', {percent(1 / counts.pop())} is even' if len(counts) == 1 else ''
    some = f'; worst {FEW} of {len(parts)} layers' if len(parts) > FEW else ''
    return [Text(f'{title}{even}{some}', 'bold'), grid(rows, width)]


def _beside(statistic: Statistic, found: Any) -> str:
    """A number beside the bars, in words; nothing of an exception that is none."""
    value = number(found)
    if statistic.form == 'exception':
        return f'{statistic.label} {percent(value)}' if value > 0 else ''
    return f'{statistic.label} {value:.2f}' if math.isfinite(value) else ''


def _bars(load: Sequence[float], room: int) -> Text:
    """A bar for each share, red where it has over twice or under a quarter of its fair share.

    Where there is no room for all, neighbours share a bar, of the one that is further from fair.
    """
    fair, line = 1 / len(load), Text()
    if len(load) > room:
        edges = [index * len(load) // room for index in range(room + 1)]
        load = [max(load[low:high], key=lambda share: abs(share - fair)) for low, high in itertools.pairwise(edges)]
    for share, bar in zip(load, charts.bars(load, max(2 * fair, *load))):
        wide = f'{bar}{bar} ' if 3 * len(load) <= room else bar
        line.append(wide, 'cyan' if fair / 4 <= share <= 2 * fair else 'red')
    return line


def numbers(
    title: str, names: Mapping[str, Statistic], layers: Mapping[int, Mapping[str, Any]]
) -> list[RenderableType]:
    """Statistics that are one number a layer: a line for each layer, or for many their range and mean."""
    having = [layer for layer, values in layers.items() if any(name in values for name in names)]
    if not having:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0), header_style='dim')
    table.add_column('')
    for name, statistic in names.items():
        table.add_column(statistic.label or name.replace('_', ' '), justify='right', no_wrap=True)
    values = {name: [number(layers[layer].get(name)) for layer in having] for name in names}
    if len(having) <= FEW:
        for row, layer in enumerate(having):
            table.add_row(f'layer {layer}', *(_digits(values[name][row]) for name in names))
        return [Text(title, 'bold'), table]
    finite = {name: [value for value in values[name] if math.isfinite(value)] for name in names}
    for words, summary in (('least', min), ('mean', lambda items: sum(items) / len(items)), ('greatest', max)):
        table.add_row(words, *(_digits(summary(finite[name] or [math.nan])) for name in names))
    return [Text(f'{title.partition(":")[0]}: {len(having)} layers', 'bold'), table]


def _digits(value: float) -> str:
    return f'{value:.4g}' if math.isfinite(value) else '–'
