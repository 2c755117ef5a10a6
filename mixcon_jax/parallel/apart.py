"""Devices that hold the parameters whole compute a step's microbatches apart, and sum what they find once.

By itself XLA sums a gradient over devices as soon as it is there: once a microbatch. Along ``data``, which does not
split parameters, each device, or group of devices along the other axes, may as well add up its own rows' part first.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Set
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mixcon_jax.parallel import rules
from mixcon_jax.parallel.axes import APART_AXES as AXES
from mixcon_jax.trees import Tree

_entered = jax.make_user_context(default_value=False)


def groups() -> int:
    """How many groups of devices compute what is being traced, each for rows of its own: 1 outside of ``summed``."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in AXES) if _entered.value else 1


def total(x: Any) -> Any:
    """The sum over the groups, of what is a sum over rows; for statistics and losses of a whole microbatch.

    Where it is differentiated, a gradient is that of all groups' results together: what each makes of a total counts
    as often as there are groups.
    """
    return jax.lax.psum(x, AXES) if _entered.value else x


def summed(function: Callable[..., Tree], rows: Tree, *whole: Tree) -> Tree:
    """``function(rows, *whole)``, by each group for its own rows, added up.

    Args:
      function: returns sums over rows; what takes in other rows than one's own does so by ``total``.
      rows: arrays `[B, ...]`, split along ``AXES``.
      whole: arrays that every group has.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    # Where no other axis has devices all are manual: nothing is left to XLA. Else the rest stays for what is split
    # inside, as XLA aborts where the axes of both together are not in the mesh's order.
    others = set(shape) - set(AXES)
    manual = {*AXES, *others} if all(shape[axis] == 1 for axis in others) else set(AXES)

    def own(rows: Tree, *whole: Tree) -> Tree:
        with _without(manual):
            found = function(rows, *whole)
        return jax.lax.psum(found, AXES)

    return jax.shard_map(
        own,
        in_specs=(PartitionSpec(AXES), *[PartitionSpec()] * len(whole)),
        out_specs=PartitionSpec(),
        axis_names=manual,
        check_vma=False,
    )(rows, *whole)


@contextlib.contextmanager
def _without(manual: Set[str]) -> Iterator[None]:
    """What is traced inside is one group's, which shares it out over the other mesh axes."""
    table = {name: tuple(axis for axis in axes if axis not in manual) for name, axes in rules.current().items()}
    with rules.using(table), _entered(True):
        yield
