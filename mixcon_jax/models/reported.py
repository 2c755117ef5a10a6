"""What metrics call that which layers report: the one place that makes these names and reads them. Loads no JAX.

A statistic NAME is ``layer_J/NAME``, J being its layer's place in the pattern; where mixer and FFN of one layer both
report it, the FFN's is ``layer_J/ffn_NAME``. A loss keeps its name, under which stands its mean over all layers that
have it. No two can meet: a statistic's own name does not begin with ``ffn_``, and a loss's is none that training
records itself.
"""

from collections.abc import Mapping
from typing import Any

from mixcon_jax.parsing import MAPPINGS, NUMBERS

FFN = 'ffn_'  # before the name of an FFN's statistic that the mixer has too
# What a record may have beside the layers' losses: what readers take for objects or numbers of another kind, and the
# rest that training writes of the step and of the run.
RECORDED = frozenset({
    *MAPPINGS, *NUMBERS, 'kind', 'step', 'z_loss', 'grad_norm', 'learning_rate', 'bad', 'bad_steps', 'skipped',
    'broken', 'tokens_per_second', 'flops_per_second', 'mfu', 'goodput',
})  # fmt: skip


def refused(kind: str, name: str) -> str | None:
    """Why a layer may not report this, or None if it may.

    Args:
      kind: ``'statistic'`` or ``'loss'``.
      name: what the layer calls it.
    """
    if kind == 'statistic' and name.startswith(FFN):
        return f"the statistic {name!r}, but {FFN} marks an FFN's where the mixer has that name too; take another name"
    if kind == 'loss' and name in RECORDED:
        return f'the loss {name!r}, which training records itself; take another name'
    return None


def statistics(j: int, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The statistics of the parts of layer j, ``{'mixer': {NAME: value}, 'ffn': ...}``, by their names in metrics."""
    mixers = parts.get('mixer', {})
    found = {f'layer_{j}/{name}': value for name, value in mixers.items()}
    for name, value in parts.get('ffn', {}).items():
        found[f'layer_{j}/{FFN if name in mixers else ""}{name}'] = value
    return found


def by_part(j: int, stats: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The other way: what each part of layer j has reported, by its own names.

    The names do not tell which part reported what one alone has, so both are given it; ``block`` shows a part what its
    class declares.
    """
    own = {name.partition('/')[2]: value for name, value in stats.items() if name.startswith(f'layer_{j}/')}
    marked = {name.removeprefix(FFN): value for name, value in own.items() if name.startswith(FFN)}
    mixers = {name: value for name, value in own.items() if not name.startswith(FFN)}
    return {'mixer': mixers, 'ffn': mixers | marked}
