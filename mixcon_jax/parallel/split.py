"""Computations that each device does for its own part of the arrays: what XLA by itself would gather first.

Inside a step on a mesh (step.py enters it by ``rules.on_mesh``) the dimensions of a call are shared
out by the mesh axes of their logical names. Without a mesh, or where an axis does not divide the call, as when one
token is decoded, it runs whole. Results are the same.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from kernels_pallas.call import Call, bind
from mixcon_jax.parallel.axes import SEQUENCE_AXIS
from mixcon_jax.parallel.rules import current
from mixcon_jax.parallel.shared import shared

Partition = dict[str, tuple[str, ...]]  # the mesh axes over which each dimension is split
TOKENS = {'b': 'batch', 't': 'sequence'}  # the axes of what needs nothing of other tokens, `by_parts`


def split(call: Call) -> Callable[..., Any]:
    """The function of a kernel's call, on each device's own part, by its context-parallel form where time is shared."""

    @functools.wraps(call.function)
    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(call.function, *args, **kwargs)
        arrays = {name: arguments[name] for name in call.dims if hasattr(arguments[name], 'ndim')}
        trees = {name: arguments[name] for name in call.trees if arguments[name] is not None}
        static = {name: value for name, value in arguments.items() if name not in arrays | trees}
        whole = call.whole(arguments)
        axes = {dim: logical for dim, logical in call.axes.items() if dim not in whole}
        partition = _partition(axes, {name: call.dims[name] for name in arrays}, arrays)
        if not partition:
            return shared(call.function, **static)(**arrays, **trees)
        function = call.function
        if call.context_parallel is not None and any(SEQUENCE_AXIS in axes for axes in partition.values()):
            function, static = call.context_parallel, static | {'axis_name': SEQUENCE_AXIS}
        return _mapped(shared(function, **static), arrays, call.dims, trees, call.results(arguments), partition)

    return run


def by_parts(
    function: Callable[..., Any],
    arrays: Mapping[str, Array],
    dims: Mapping[str, str],
    result: str | tuple[str, ...],
    axes: Mapping[str, str],
) -> Any:
    """Runs ``function(**arrays)``, which needs nothing of another part, on each device's own part.

    For computations that XLA cannot split by itself, such as a sort. The gradients of an array that is whole on every
    device are summed over the devices.

    Args:
      function: takes arrays by name and returns one, or several. Where it does need something of other parts, it
        exchanges it itself, over the mesh axes of that dimension (``axes_of``).
      dims: the dimensions of each array: ``{'x': 'b t d'}``.
      result: those of what it returns, of several a tuple.
      axes: the logical axis of each dimension that may be shared out: ``{'b': 'batch'}``.
    """
    named = {name: tuple(text.split()) for name, text in dims.items()}
    partition = _partition(axes, named, arrays)
    if not partition:
        return function(**arrays)
    return _mapped(function, arrays, named, {}, result, partition)


def axes_of(logical: str) -> tuple[str, ...]:
    """The mesh axes that split a dimension of this logical axis."""
    return current()[logical]


def shards_of(logical: str, size: int) -> int:
    """Into how many parts the mesh of this step splits a dimension of this size: 1 where it does not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty else math.prod(mesh.shape.get(axis, 1) for axis in current()[logical])
    return count if size % count == 0 else 1


def _partition(axes: Mapping[str, str], dims: Mapping[str, tuple[str, ...]], arrays: Mapping[str, Array]) -> Partition:
    """The mesh axes of every dimension that this step splits: all that ask for a mesh axis, or none of them."""
    sizes: dict[str, int] = {}
    for name, value in arrays.items():
        for dim, size in zip(_spread(dims[name], value.ndim), value.shape):
            sizes.setdefault(dim, size)
    rules = current()
    asked = {dim: rules[logical] for dim, logical in axes.items() if dim in sizes}
    split = {dim for dim in asked if shards_of(axes[dim], sizes[dim]) > 1}
    whole = {axis for dim in asked.keys() - split for axis in asked[dim]}
    return {dim: asked[dim] for dim in asked if dim in split and not whole & set(asked[dim])}


def _mapped(
    function: Callable[..., Any],
    arrays: Mapping[str, Array],
    dims: Mapping[str, tuple[str, ...]],
    trees: Mapping[str, Any],
    results: str | tuple[str, ...],
    partition: Partition,
) -> Any:
    """The function under ``shard_map``; mesh axes that split nothing of it stay with XLA."""
    used = {axis for axes in partition.values() for axis in axes}
    # Nor do axes of one device, but where XLA keeps one its CPU compiler aborts at sums of bfloat16 gradients. They go
    # with what is shared: a gradient is summed over all axes that its array's spec does not name.
    mesh = jax.sharding.get_abstract_mesh()
    idle = tuple(axis for axis in mesh.auto_axes if mesh.shape[axis] == 1 and axis not in used)

    def spec(names: Sequence[str]) -> PartitionSpec:
        entries = [partition.get(name) for name in names]
        first = next((i for i, axes in enumerate(entries) if axes), None)
        return PartitionSpec(*(axes + idle if i == first and axes else axes for i, axes in enumerate(entries)))

    specs = {name: spec(_spread(dims[name], value.ndim)) for name, value in arrays.items()}
    return jax.shard_map(
        lambda arrays, trees: function(**arrays, **trees),
        in_specs=(specs, PartitionSpec()),
        out_specs=jax.tree.map(lambda text: spec(text.split()), results),
        axis_names=used | set(idle),
        check_vma=False,
    )(dict(arrays), dict(trees))


def _spread(names: tuple[str, ...], rank: int) -> list[str]:
    """A name for every axis: one with a star, which stands for several or none, is repeated."""
    stars = rank - sum(not name.startswith('*') for name in names)
    return [name for name in names for _ in range(stars if name.startswith('*') else 1)]
