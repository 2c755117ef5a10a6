"""The table of logical axes that a step goes by: that of ``axes.RULES``, or with an experiment's changes.

It is part of what JAX traces by, as the mesh is: a function that was traced under another table is traced anew.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from mixcon_jax.parallel.axes import RULES, Rules

_table = jax.make_user_context(default_value=None)
_traced: contextvars.ContextVar[dict[Any, Callable[..., Any]]] = contextvars.ContextVar('traced')


def current() -> Rules:
    """The table of the step that is being traced; elsewhere that of ``axes.RULES``."""
    items = _table.value
    return RULES if items is None else dict(items)


@dataclasses.dataclass(frozen=True)
class Place:
    """A mesh and its table; hashable, for functions that are compiled for it."""

    mesh: Mesh
    items: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def rules(self) -> Rules:
        return dict(self.items)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """What is traced inside is shared out over it."""
        return on_mesh(self.mesh, self.rules)


@contextlib.contextmanager
def on_mesh(mesh: Mesh | AbstractMesh, rules: Rules) -> Iterator[None]:
    """What is traced inside is shared out over this mesh by these rules."""
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    token = _traced.set({})
    try:
        with _table(tuple(rules.items())), jax.sharding.use_abstract_mesh(abstract):
            yield
    finally:
        _traced.reset(token)


def traced_once(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """``function`` with these arguments; within a step it is traced and lowered once for all layers that call it alike.

    Args:
      function: takes arrays by name, and ``static``; the same object wherever the same is called.
      static: hashable.
    """
    traced, call = _traced.get(None), functools.partial(function, **static)
    return call if traced is None else traced.setdefault((function, tuple(sorted(static.items()))), jax.jit(call))
