"""One run in detail: loss over steps, other numbers, where time goes, experts and gains."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mixcon_jax.units import short
from mixcon_jax.watching import charts
from mixcon_jax.watching.cells import grid, newest, percent, progress, room_beside, state_cell, time_left, titles
from mixcon_jax.watching.follow import Run, number

SHARES = {
    'goodput': ('steps', 'green'), 'startup': ('start-up', 'blue'), 'compile': ('compile', 'magenta'),
    'data': ('data', 'red'), 'checkpoint': ('checkpoint', 'yellow'), 'evaluation': ('evaluation', 'cyan'),
}  # fmt: skip
GAIN = ('gain_norm', 'correction', 'kappa', 'alpha', 'decay')  # in this order; what else there is follows
FEW = 8  # layers that are shown one by one
SIDE_BY_SIDE = 120  # columns from which on the model's statistics stand beside the chart


def details(run: Run, now: float, width: int, chart: int) -> RenderableType:
    """One run: loss over steps in ``chart`` lines, other numbers, where time goes, experts and gains."""
    title = Text.assemble((titles([run])[0], 'bold'), f' · seed {run.option("seed", "?")} · {run.folder}')
    head = Text(f'step {run.step}/{run.steps or "?"} ', no_wrap=True) + progress(run) + ' ' + state_cell(run, now)
    head.append(
        f'  {run.option("model.num_blocks", 1)} x ({_pattern(run)}), width {run.option("model.dim", "?")}', 'dim'
    )
    head.truncate(width, overflow='ellipsis')
    stats = run.train.get('stats') if run.train else None
    layers = per_layer(stats if isinstance(stats, dict) else {}, len(run.option('model.pattern', [])))
    halves = width // 2 - 2 if width >= SIDE_BY_SIDE and layers else width
    left = [*_chart(run, halves, chart), _numbers(run, now, halves), _time(run, halves)]
    right = [*experts(layers, halves), *gains(layers)]
    if halves == width:
        return Group(Rule(title, align='left'), head, *left, *right)
    panes = Table.grid(padding=(0, 4, 0, 0))
    panes.add_column(width=halves)
    panes.add_column()
    panes.add_row(Group(*left), Group(*right))
    return Group(Rule(title, align='left'), head, panes)


def _pattern(run: Run) -> str:
    """The layers of a block, neighbours that are alike told once."""
    groups = [(layer, len(list(group))) for layer, group in itertools.groupby(run.option('model.pattern', []))]
    return ', '.join(f'{count} {layer}' if count > 1 else str(layer) for layer, count in groups)


def _chart(run: Run, width: int, height: int) -> list[RenderableType]:
    """Training loss as a line, held-out scores as points on it."""
    points, scores = run.curves['loss'].points, run.curves['heldout'].points
    if not points:
        return [Text('no step has been made yet', 'dim')]
    xs, ys = (points[0][0], max(points[-1][0], run.step)), charts.span([*points, *scores])
    room = max(10, width - 8)
    lines = [Text(line, 'cyan') for line in charts.braille(points, room, height, xs, ys)]
    for x, y in scores:
        column, row = charts.cell(x, y, xs, ys, room, height)
        lines[row] = Text.assemble(lines[row][:column], Text('●', 'yellow'), lines[row][column + 1 :])
    labels = [f'{ys[1]:7.3f} ', *[' ' * 8] * (height - 2), f'{ys[0]:7.3f} ']
    ends = f'{xs[0]:.0f}', f'step {xs[1]:.0f}'
    legend = Text.assemble(('─', 'cyan'), ' loss  ', ('●', 'yellow'), ' held out')
    gap = room - legend.cell_len - sum(map(len, ends))
    foot = Text.assemble(' ' * 8, ends[0], ' ' * max(1, gap // 2), legend, ' ' * max(1, gap - gap // 2), ends[1])
    foot.truncate(width)
    return [*(Text.assemble((label, 'dim'), line) for label, line in zip(labels, lines)), foot]


def _numbers(run: Run, now: float, width: int) -> RenderableType:
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
    name = 'took' if run.state(now) == 'done' else 'time left'
    rows.append([name, Text(time_left(run, now).strip('()')), f'checkpoint at step {run.saved}' if run.saved else ''])
    if train.get('skipped'):
        bad = f'not finite; {train.get("bad_steps", 0)} in a row now'
        rows.append(['skipped steps', Text(str(train['skipped']), 'bold red'), bad])
    return grid(rows, width, right=(1,))


def _time(run: Run, width: int) -> RenderableType:
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


def experts(layers: Mapping[int, Mapping[str, Any]], width: int) -> list[RenderableType]:
    """Each expert's share of its layer's load as a bar; of many layers those whose load is least even."""
    loads = {
        layer: [number(share) for share in values['moe_load']]
        for layer, values in layers.items()
        if isinstance(values.get('moe_load'), list) and values['moe_load']
    }
    if not loads:
        return []
    worst = sorted(loads, key=lambda layer: -max(loads[layer]) * len(loads[layer]))[:FEW]
    rows: list[list[str | Text]] = []
    for layer in sorted(worst):
        load, dropped = loads[layer], number(layers[layer].get('moe_dropped'))
        entropy = number(layers[layer].get('moe_entropy'))
        words = [
            f'{percent(min(load))} to {percent(max(load))}',
            f'entropy {entropy:.2f}' if math.isfinite(entropy) else '',
            f'dropped {percent(dropped)}' if dropped > 0 else '',
        ]
        rows.append([f'layer {layer}', *words])
    room = room_beside(rows, width)
    rows = [[*row, _bars(loads[layer], room)] for row, layer in zip(rows, sorted(worst))]
    counts = {len(load) for load in loads.values()}
    even = f', {percent(1 / counts.pop())} is even' if len(counts) == 1 else ''
    some = f'; worst {FEW} of {len(loads)} layers' if len(loads) > FEW else ''
    return [Text(f'experts: share of tokens{even}{some}', 'bold'), grid(rows, width)]


def _bars(load: Sequence[float], room: int) -> Text:
    """A bar for each expert, red where it has over twice or under a quarter of its fair share.

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


def gains(layers: Mapping[int, Mapping[str, Any]]) -> list[RenderableType]:
    """The other statistics, Conba's gain above all: a line for each layer, or for many their range and mean."""
    found = {name: None for values in layers.values() for name in values if not name.startswith('moe_')}
    names = [name for name in GAIN if name in found] + [name for name in found if name not in GAIN]
    having = [layer for layer, values in layers.items() if any(name in values for name in names)]
    if not having:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0), header_style='dim')
    table.add_column('')
    for name in names:
        table.add_column(name.replace('_', ' '), justify='right', no_wrap=True)
    values = {name: [number(layers[layer].get(name)) for layer in having] for name in names}
    if len(having) <= FEW:
        for row, layer in enumerate(having):
            table.add_row(f'layer {layer}', *(_digits(values[name][row]) for name in names))
    else:
        finite = {name: [value for value in values[name] if math.isfinite(value)] for name in names}
        for title, summary in (('least', min), ('mean', lambda items: sum(items) / len(items)), ('greatest', max)):
            table.add_row(title, *(_digits(summary(finite[name] or [math.nan])) for name in names))
    title = 'Conba' if any(name in found for name in GAIN) else 'layers'
    return [Text(f'{title}: gain and step' if len(having) <= FEW else f'{title}: {len(having)} layers', 'bold'), table]


def _digits(value: float) -> str:
    return f'{value:.4g}' if math.isfinite(value) else '–'
