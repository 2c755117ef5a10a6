"""Where parameters, optimizer state and batches lie on the device mesh.

Five axes: ``data`` splits the batch and replicates parameters, ``fsdp`` splits both, ``expert`` the batch and experts,
``context`` the sequence, ``tensor`` heads and widths. Every parameter names its dimensions (``logical_axes``); one
table (``axes.RULES``, with the changes of ``mesh.rules``) maps those names to mesh axes, and XLA inserts the
communication.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from mixcon_jax.errors import ConfigError
from mixcon_jax.parallel.axes import BATCH_AXES, ROWS, Rules, rows
from mixcon_jax.parallel.rules import current
from mixcon_jax.trees import Tree, map_named, named_leaves


def partition_spec(
    logical_axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules | None = None
) -> PartitionSpec:
    """The spec of one array; a dimension that its mesh axes do not divide stays replicated.

    A mesh axis splits one dimension at most: the first that asks for it. ``rules`` are the step's if left out.
    """
    rules = current() if rules is None else rules
    spec: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, size in zip(logical_axes, shape, strict=True):
        axes = tuple(axis for axis in rules.get(name or '', ()) if mesh.shape[axis] > 1 and axis not in used)
        splits = bool(axes) and size % math.prod(mesh.shape[axis] for axis in axes) == 0
        spec.append(axes if splits else None)
        used.update(axes if splits else ())
    return PartitionSpec(*spec)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows [B, ...] over the batch axes; the devices that share a row's tokens all get it, as it is small."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """The parts of a batch's rows that this process's devices take, and how many equal parts there are.

    Processes that an axis which shares out no rows goes across take the same parts.
    """
    count = rows(mesh.shape)
    spans = batch_sharding(mesh).devices_indices_map((count,))
    devices = mesh.devices.flat
    own = {spans[device][0].start or 0 for device in devices if device.process_index == jax.process_index()}
    return tuple(sorted(own)), count


def place_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """A global batch on the devices, from the rows of ``own_rows``, one part after the other: ``[own rows, ...]``.

    Raises:
      ConfigError: they do not split into these parts.
    """
    parts, count = own_rows(mesh)
    sharding = batch_sharding(mesh)

    def place(own: np.ndarray) -> Array:
        size, rest = divmod(len(own), len(parts))
        if rest:
            number = len(own) * count // len(parts)
            raise ConfigError(f'a batch of {number} rows does not split over {ROWS} = {count} devices')

        def part(index: Any) -> np.ndarray:  # one slice a dimension
            begin = parts.index((index[0].start or 0) // size) * size
            return own[begin : begin + size]

        return jax.make_array_from_callback((size * count, *own.shape[1:]), sharding, part)

    return {key: place(np.asarray(x)) for key, x in batch.items()}


def param_shardings(
    params: Tree, logical_axes: Mapping[str, Sequence[str | None]], mesh: Mesh, rules: Rules | None = None
) -> Tree:
    """A sharding for every parameter, given (abstract) parameters and their axis names."""
    spec = lambda name, shape: partition_spec(logical_axes[name], shape, mesh, rules)
    return map_named(lambda name, x: NamedSharding(mesh, spec(name, x.shape)), params)


def opt_state_shardings(opt_state: Tree, params: Tree, shardings: Tree, mesh: Mesh) -> Tree:
    """Shardings of an optimizer's state: a leaf shaped like its parameter lies like it, all else is replicated.

    A leaf belongs to the parameter whose name ends the leaf's path, or stands inside it when the optimizer keeps
    several values per parameter.
    """
    layouts = {name: (x.shape, s) for (name, x), s in zip(named_leaves(params).items(), jax.tree.leaves(shardings))}
    longest_first = sorted(layouts, key=len, reverse=True)

    def layout(path: str, leaf: Any) -> NamedSharding:
        owner = next((name for name in longest_first if f'/{name}/' in f'/{path}/'), None)
        if owner is not None and layouts[owner][0] == leaf.shape:
            return layouts[owner][1]
        return replicated(mesh)

    return map_named(layout, opt_state)


def constrain(x: Array, *logical_axes: str | None) -> Array:
    """Asks XLA to lay ``x`` out by the logical names of its dimensions, rows being ``'batch'``.

    Only inside a step (``rules.on_mesh``) of more than one device; elsewhere ``x`` comes back as is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = partition_spec(logical_axes, x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def stream(x: Array) -> Array:
    """The residual stream `[B, T, D]` as every device has it, its gradient likewise: its own tokens, whole.

    Parameters of one dimension are shared out over it, by which XLA would otherwise split features.
    """
    return constrain(x, 'batch', 'sequence', None)
