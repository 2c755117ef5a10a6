"""The table of logical axes that a step goes by: that of ``axes.RULES``, or with an experiment's changes.

It is part of what JAX traces by, as the mesh is: a function that was traced under another table is traced anew.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, Mesh

from mixcon_jax.parallel.axes import RULES, Rules
from mixcon_jax.parallel.shared import one_step

_table = jax.make_user_context(default_value=None)


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


def using(rules: Rules) -> contextlib.AbstractContextManager[None]:
    """What is traced inside goes by another table, on the same mesh."""
    return _table(tuple(rules.items()))


@contextlib.contextmanager
def on_mesh(mesh: Mesh | AbstractMesh, rules: Rules) -> Iterator[None]:
    """What is traced inside is shared out over this mesh by these rules."""
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    with using(rules), jax.sharding.use_abstract_mesh(abstract), one_step():
        yield
