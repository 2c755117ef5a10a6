"""Functions that the layers of a step have in common: traced and lowered once, however many layers call them alike."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

Functions = dict[Any, Callable[..., Any]]

_functions: contextvars.ContextVar[Functions | None] = contextvars.ContextVar('functions', default=None)


@contextlib.contextmanager
def one_step() -> Iterator[None]:
    """What is traced inside is one step; nothing of it is kept for the next."""
    token = _functions.set({})
    try:
        yield
    finally:
        _functions.reset(token)


def shared(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """``function`` with these arguments, of which a step has one.

    Args:
      function: takes arrays, and ``static``; the same object wherever the same is called.
      static: what is not hashable is not told apart, so that such a function is every caller's own.
    """
    functions, call = _functions.get(), functools.partial(function, **static)
    key = function, tuple(sorted(static.items()))
    if functions is None or not _hashable(key):
        return call
    if key not in functions:
        functions[key] = jax.jit(call)
    return functions[key]


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
