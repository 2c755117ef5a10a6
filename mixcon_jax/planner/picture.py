"""A search as a picture: memory against estimated seconds, the plans that none beats joined, the limit."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mixcon_jax.reports import style
from mixcon_jax.reports.figures import in_style, render
from mixcon_jax.units import memory

GIB = 2**30


def draw(found: dict[str, Any], kind: str) -> bytes:
    """The picture of what `search.search` returns; ``kind`` is 'svg' or 'png'."""
    with in_style():
        return render(figure(found), kind)


def figure(found: dict[str, Any]) -> Figure:
    """One marker a plan, numbered as in the table, and beside them what sets each apart."""
    plans = found['plans']
    labels = [style.literal(f'{number} {one["sets"]}', 48) for number, one in enumerate(plans, 1)]
    lines = sum(1 + label.count('\n') for label in labels)
    drawn, (axes,) = style.figure(8.6, max(3.4, 0.6 + 0.155 * (lines + len(labels) / 3)))
    places = [(one['peak'] / GIB, one['seconds_a_step']) for one in plans]
    best = sorted(place for place, one in zip(places, plans, strict=True) if one['best'])
    if best:
        axes.plot(*zip(*best, strict=True), '-', color=style.COLORS[0], zorder=1)
    handles = []
    for number, (place, one, label) in enumerate(zip(places, plans, labels, strict=True), 1):
        color = style.COLORS[0] if one['best'] else style.GRAY if one['fits'] else style.COLORS[1]
        fill = color if one['best'] else 'white'
        look: dict[str, Any] = {'marker': 'o' if one['fits'] else 'X', 'ms': 6, 'color': color, 'mfc': fill}
        axes.plot(*place, ls='', **look)
        axes.annotate(str(number), place, xytext=(4, 4), textcoords='offset points', fontsize=8, color=color)
        handles.append(Line2D([], [], ls='', label=label, **look))
    axes.axvline(found['limit'] / GIB, color=style.COLORS[1], ls='--', lw=1, zorder=1)
    axes.annotate(
        f'limit {memory(found["limit"])}', (found['limit'] / GIB, 1), xycoords=('data', 'axes fraction'),
        xytext=(-3, -3), textcoords='offset points', rotation=90, ha='right', va='top', fontsize=8,
        color=style.COLORS[1],
    )  # fmt: skip
    axes.set(xlabel='GiB a device at the peak', ylabel='estimated seconds a step (not measured)')
    axes.margins(0.08)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    style.note(axes, 'filled and joined: no other that fits is faster and smaller · cross: does not fit')
    drawn.legend(handles, [str(handle.get_label()) for handle in handles], loc='outside right upper')
    return drawn
