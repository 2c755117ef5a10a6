"""How large all numbers of a tree are together, however devices share them out: their norm, and whether all are finite.

A tree has hundreds of arrays, most of them vectors. Reduced one by one each takes a GPU a launch or two, and gives a
number of its own for devices to exchange and to add. So the rows of large arrays are reduced array by array, and what
comes of them, with the small arrays as they are, all at once.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from mixcon_jax.trees import Tree

SMALL = 2**16  # numbers of an array that is not worth a launch of its own


def norm(tree: Tree, specs: Tree) -> Float[Array, '']:
    """The square root of the sum of all squares, in float32.

    Args:
      tree: of arrays.
      specs: the PartitionSpec of each, on the mesh of the step that is being traced.
    """
    by_axes: dict[tuple[str, ...], list[int]] = defaultdict(list)  # what splits arrays, and which
    for index, spec in enumerate(jax.tree.leaves(specs)):
        by_axes[tuple(sorted(_axes(spec)))].append(index)

    shared_out = jax.sharding.get_abstract_mesh().size > 1

    def own(leaves: Sequence[Array]) -> Array:
        parts = []
        for axes, indices in by_axes.items():
            part = _reduced(jnp.square, jnp.sum, [leaves[index] for index in indices])
            parts.append(jax.lax.psum(part, axes) if axes and shared_out else part)
        return jnp.sqrt(sum(parts))

    return _on_every_device(own, tree, specs)


def all_finite(tree: Tree, specs: Tree) -> Bool[Array, '']:
    """Whether no array of floating-point numbers holds NaN or an infinity.

    By the largest magnitude's bits, as an integer: those of an infinity come after those of every finite number, and
    those of NaN after them. The largest float would take as long, but XLA:CPU, and libraries that exchange numbers, may
    put a number above NaN; and ``isfinite`` takes as long on a CPU as the whole update.

    Args:
      tree: of arrays.
      specs: as for `norm`.
    """
    infinite = np.float32(np.inf).view(np.int32)

    def own(leaves: Sequence[Array]) -> Array:
        largest = _reduced(lambda x: jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32), jnp.max, leaves)
        mesh = jax.sharding.get_abstract_mesh()
        return (jax.lax.pmax(largest, mesh.axis_names) if mesh.size > 1 else largest) < infinite

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True)
    floats = [(x, spec) for x, spec in pairs if jnp.issubdtype(x.dtype, jnp.floating)]
    return _on_every_device(own, *map(list, zip(*floats)))


def _reduced(each: Callable[[Array], Array], reduce: Callable[..., Array], leaves: Sequence[Array]) -> Array:
    """``reduce`` of ``each`` number of all arrays, as float32."""
    wide = [each(leaf.astype(jnp.float32)) for leaf in leaves]
    rows = [x.reshape(-1) if x.size <= SMALL else reduce(x, axis=-1).reshape(-1) for x in wide]
    # Without the barrier XLA would reduce every vector by itself again.
    return reduce(jax.lax.optimization_barrier(jnp.concatenate(rows)))


def _on_every_device(own: Callable[[Sequence[Array]], Array], tree: Tree, specs: Tree) -> Array:
    """``own`` of the parts of a tree's leaves that each device has; all devices come to the same."""
    leaves, specs = jax.tree.leaves(tree), jax.tree.leaves(specs)
    if jax.sharding.get_abstract_mesh().size <= 1:
        return own(leaves)
    return jax.shard_map(own, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False)(leaves)


def _axes(spec: Any) -> set[str]:
    """The mesh axes that a PartitionSpec names."""
    return {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
