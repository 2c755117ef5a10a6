"""A kernel's call, declared once: the annotations of its entry point name the dimensions of every array.

``u: Float[Array, 'b t d']`` is what a reader sees, what checks shapes, and what says how a mesh may split the call.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

KEPT = 'kept'  # names, for policies of `jax.checkpoint`, what backward passes keep of forward passes in plain XLA
Dims = tuple[str, ...]
DimSizes = dict[str, Any]  # of dimensions by name; a tuple where the name stands for several ('*slots')


@dataclasses.dataclass(frozen=True)
class Call:
    """An entry point as its shape checks and a mesh see it.

    Attributes:
      function: on one device; what is annotated as an array has dimensions, what is annotated as a tuple is a tree of
        arrays that every device gets whole, and all else is static.
      results: of a call's arguments, the dimensions of each result as in an annotation; of one result alone a string.
      axes: the logical axis of each dimension that may be split over devices: along it no result depends on another
        part, or `context_parallel` exchanges what does.
      context_parallel: the function with `axis_name` besides, for a time 't' that a mesh axis shares out.
      whole: of a call's arguments, the dimensions that may not be split all the same.
    """

    function: Callable[..., Any]
    results: Callable[[Mapping[str, Any]], str | tuple[str, ...]]
    axes: Mapping[str, str]
    context_parallel: Callable[..., Any] | None = None
    whole: Callable[[Mapping[str, Any]], Collection[str]] = lambda arguments: ()

    @functools.cached_property
    def dims(self) -> dict[str, Dims]:
        """The dimensions of every argument that is an array."""
        return dimensions(self.function)

    @functools.cached_property
    def trees(self) -> frozenset[str]:
        """The arguments that are trees of arrays."""
        parameters = inspect.signature(self.function).parameters.values()
        return frozenset(p.name for p in parameters if tuple in (p.annotation, *typing.get_args(p.annotation)))


def bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """All arguments of a call by name, defaults included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@functools.cache
def dimensions(function: Callable[..., Any]) -> dict[str, Dims]:
    """Of every parameter that is annotated as an array, or an array or None: ``{'u': ('b', 't', 'd')}``."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        for choice in (parameter.annotation, *typing.get_args(parameter.annotation)):
            if hasattr(choice, 'dim_str'):
                found[name] = tuple(choice.dim_str.split())
    return found


def sizes(
    function: Callable[..., Any], arguments: Mapping[str, Any], words: Mapping[str, str], **known: int | tuple[int, ...]
) -> DimSizes:
    """The size of every dimension of a call, from the shapes of its arguments.

    Args:
      function: the entry point.
      arguments: by name; None for what is not given.
      words: what a dimension is, for errors; one of `>= 1` is never empty.
      known: sizes that do not come from an array; a tuple for a name with a star.

    Raises:
      ValueError: a shape that does not fit, naming the argument and what would be right.
    """
    return fitted(function.__name__, dimensions(function), arguments, words, **known)


def fitted(
    name: str,
    dims: Mapping[str, Dims],
    arguments: Mapping[str, Any],
    words: Mapping[str, str],
    **known: int | tuple[int, ...],
) -> DimSizes:
    """`sizes` of named arrays whose dimensions no annotation says; `name` is the function's, for errors."""
    found: DimSizes = dict(known)
    for argument, wanted in dims.items():
        value = arguments.get(argument)
        if not hasattr(value, 'shape'):
            continue
        shape = tuple(value.shape)
        expected = [size for dim in wanted for size in _expected(dim, found, words)]
        fits = len(shape) == len(expected) and all(
            size == want if isinstance(want, int) else size >= ('>= 1' in want) for size, want in zip(shape, expected)
        )
        if not fits:
            raise ValueError(f'{name}: {argument} has shape {shape}, expected {_shown(expected)}')
        for dim, size in zip(_flat(wanted, found), shape):
            found.setdefault(dim, size)
    return found


def _expected(dim: str, found: DimSizes, words: Mapping[str, str]) -> tuple[int | str, ...]:
    """The sizes that a dimension must have, or the word for one that is not known yet."""
    known = found.get(dim.lstrip('*'))
    if known is None:
        return (words.get(dim, dim),)
    return known if isinstance(known, tuple) else (known,)


def _flat(wanted: Dims, found: DimSizes) -> list[str]:
    """The name of every axis: a name that stands for several is repeated."""
    return [dim for dim in wanted for _ in range(len(found[dim[1:]]) if dim.startswith('*') else 1)]


def _shown(expected: list[int | str]) -> str:
    if all(isinstance(size, str) for size in expected):
        return f'[{", ".join(map(str, expected))}]'
    return f'({", ".join(map(str, expected))}{"," if len(expected) == 1 else ""})'
