"""Parameters as nested dicts of arrays, and the names of their leaves.

A model's state leaves Flax as plain nested dicts whose keys are strings (``{'blocks': {'layers': {'3': ...}}}``):
optimizers, checkpoints and other programs read those without Flax. A leaf's name is its path joined with slashes,
``blocks/layers/3/mixer/in_proj``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Tree = Any  # nested dicts of arrays, or of whatever stands for them
Shapes = Mapping[str, tuple[int, ...]]  # of arrays by name
State = Any  # an nnx.State; naming it here would make beartype warn of a deprecated hint inside Flax


def named_leaves(tree: Tree) -> dict[str, Any]:
    """The leaves of any tree by name, in the tree's own order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in paths}


def map_named(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``jax.tree.map`` whose function takes the leaf's name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(jax.tree_util.keystr(path, simple=True, separator='/'), *leaves), tree, *rest
    )


def from_state(state: State) -> dict[str, Any]:
    """The values of an ``nnx.State`` as nested dicts with string keys."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, last = map(str, path)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = variable.get_value()
    return tree


def to_state(tree: Mapping[str, Any], template: State) -> State:
    """The ``nnx.State`` of nested dicts; types and metadata of the variables are the template's."""
    values = named_leaves(tree)
    return nnx.from_flat_state(
        [(path, variable.replace(values['/'.join(map(str, path))])) for path, variable in nnx.to_flat_state(template)]
    )


def undecayed(state: State) -> frozenset[str]:
    """The names of the variables that say of themselves that weight decay must leave them alone."""
    flat = nnx.to_flat_state(state)
    return frozenset(
        '/'.join(map(str, path)) for path, variable in flat if not variable.get_metadata().get('decay', True)
    )


def rates(state: State) -> dict[str, float]:
    """The learning rates, as multiples of the optimizer's, of the variables that ask for another, by name."""
    flat = {'/'.join(map(str, path)): v.get_metadata().get('rate', 1.0) for path, v in nnx.to_flat_state(state)}
    return {name: float(rate) for name, rate in flat.items() if rate != 1.0}


def logical_axes(state: State) -> dict[str, tuple[str | None, ...]]:
    """Each variable's logical axis names by its name.

    Raises:
      ValueError: a variable names no axes, or not as many as its rank.
    """
    axes = {}
    for path, variable in nnx.to_flat_state(state):
        name, rank = '/'.join(map(str, path)), len(variable.get_value().shape)
        names = variable.get_metadata().get('logical_axes', None)
        if names is None or len(names) != rank:
            raise ValueError(f'{name} has rank {rank} but logical_axes {names}; name one axis per dimension')
        axes[name] = tuple(names)
    return axes
