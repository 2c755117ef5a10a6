"""How large all numbers of a tree are together, however devices share them out: their norm, and whether all are finite.

A tree has hundreds of arrays, most of them vectors. Reduced one by one each takes a GPU a launch or two, and gives a
number of its own for devices to exchange and to add. So the rows of large arrays are reduced array by array, and what
comes of them, with the small arrays as they are, all at once.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from mixcon_jax.parallel.axes import named
from mixcon_jax.trees import Tree

SMALL = 2**16  # numbers of an array that is not worth a launch of its own
ROW = 128  # numbers of a row at least, where the array has as many


def norm(tree: Tree, specs: Tree) -> Float[Array, '']:
    """The square root of the sum of all squares, in float32.

    Args:
      tree: of arrays.
      specs: the PartitionSpec of each, on the mesh of the step that is being traced.
    """
    return jnp.sqrt(_sum(jnp.square, tree, specs))


def all_finite(tree: Tree, specs: Tree) -> Bool[Array, '']:
    """Whether no array holds NaN or an infinity.

    By a sum of zeros, what each number differs from itself by: for an infinity and for NaN that is NaN. The largest
    magnitude would not show NaN on a CPU, where XLA may take a number for larger; ``isfinite`` takes it twice as long.

    Args:
      tree: of arrays.
      specs: as for `norm`.
    """
    return _sum(lambda x: x - x, tree, specs) == 0


def _sum(each: Callable[[Array], Array], tree: Tree, specs: Tree) -> Float[Array, '']:
    """The sum of ``each`` number, in float32; every device adds up its own parts, and all come to the same."""
    leaves, specs = jax.tree.leaves(tree), jax.tree.leaves(specs)
    by_axes: dict[tuple[str, ...], list[int]] = defaultdict(list)  # what splits arrays, and which
    for index, (_, spec) in enumerate(zip(leaves, specs, strict=True)):
        by_axes[named(*spec)].append(index)

    def own(leaves: Sequence[Array]) -> Array:
        total = jnp.zeros((), jnp.float32)
        for axes, indices in by_axes.items():
            rows = jnp.concatenate([_rows(each(leaves[index].astype(jnp.float32))) for index in indices])
            # Without the barrier XLA would reduce every array by itself again.
            part = jnp.sum(jax.lax.optimization_barrier(rows))
            total += jax.lax.psum(part, axes) if axes else part
        return total

    if jax.sharding.get_abstract_mesh().size <= 1:
        return own(leaves)
    return jax.shard_map(own, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False)(leaves)


def _rows(x: Array) -> Array:
    """A vector with the same sum: of a large array a number a row, of as many last dimensions as make a row."""
    if x.size <= SMALL:
        return x.reshape(-1)
    first = x.ndim - 1
    while first and math.prod(x.shape[first:]) < ROW:
        first -= 1
    return jnp.sum(x, axis=tuple(range(first, x.ndim))).reshape(-1)
