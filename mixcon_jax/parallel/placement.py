"""How parameters are shared out over a mesh, in words: what a run says before its first step."""

import math
from collections.abc import Iterator, Mapping, Sequence

from jax.sharding import Mesh

from mixcon_jax.parallel.axes import named
from mixcon_jax.trees import Tree, named_leaves
from mixcon_jax.units import short

LARGE = 2**20  # elements of an array that should not lie whole on every device of a mesh that splits parameters


def placement(params: Tree, logical_axes: Mapping[str, Sequence[str | None]], mesh: Mesh) -> list[str]:
    """A line for every group of parameters that are laid out alike, and one for large arrays that no axis splits.

    Args:
      params: arrays or their shapes, with shardings.
      logical_axes: axis names of every parameter, by name.
      mesh: of the shardings.
    """
    if mesh.size == 1:
        return []
    groups: dict[tuple, list[tuple[str, int]]] = {}
    for name, leaf in named_leaves(params).items():
        spec = (*leaf.sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
        dims = tuple(zip((axis or '-' for axis in logical_axes[name]), map(named, spec)))
        groups.setdefault(tuple(dim for dim in dims if dim[0] != 'layers'), []).append((name, math.prod(leaf.shape)))
    if not any(axes for dims in groups for _, axes in dims):
        return ['parameters are whole on every device']
    lines, whole = [], []
    for dims, found in groups.items():
        over = [axis for _, axes in dims for axis in axes]
        parts = math.prod(mesh.shape[axis] for axis in over)
        number = sum(size for _, size in found)
        arrays = f'{len(found)} array{"s" if len(found) > 1 else ""}'
        lines.append(
            f'{" x ".join(_words(dims))}: {arrays}, {short(number)} parameters, {short(number / parts)} a device'
        )
        if parts == 1:
            whole += [f'{name} ({short(size)})' for name, size in found if size >= LARGE]
    if whole:
        lines.append(f'large, but whole on every device: {", ".join(whole)}')
    return lines


def _words(dims: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[str]:
    """``embed/fsdp`` for a dimension that an axis splits, ``embed`` for one that none does."""
    for name, axes in dims:
        yield f'{name}/{"+".join(axes)}' if axes else name
