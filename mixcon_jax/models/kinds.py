"""The registered kinds of layers, and what each says of its options, without importing it: declared.py reads it.

``load`` imports the class itself.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from mixcon_jax.errors import ConfigError
from mixcon_jax.models import declared, reported
from mixcon_jax.models.ffns import FFNS
from mixcon_jax.models.mixers import MIXERS
from mixcon_jax.options import OPTIONS, Option, Statistic

REGISTRIES = {'mixer': MIXERS, 'ffn': FFNS}  # by the role in a pattern's layer


@dataclasses.dataclass(frozen=True)
class Description:
    """What a kind says of itself: its declarations and those of its bases, bases first."""

    declarations: tuple[declared.Declaration, ...]

    @property
    def options(self) -> dict[str, dict[str, Option]]:
        """The groups of options below ``config.model``."""
        return {name: dict(group) for part in self.declarations for name, group in part.options.items()}

    @property
    def statistics(self) -> dict[str, Statistic]:
        return {name: statistic for part in self.declarations for name, statistic in part.statistics.items()}

    def check(self, model) -> None:
        """Refuses options of ``config.model`` that do not go together."""
        for part in self.declarations:
            if part.check is not None:
                part.check(model)

    def check_split(self, model, shards: Mapping[str, int]) -> None:
        """Refuses options of ``config.model``, resolved, that a mesh cannot share out."""
        for part in self.declarations:
            if part.check_split is not None:
                part.check_split(model, shards)

    def group_of(self, option: str) -> str | None:
        """The group that has an option of this name; of several, that of the class nearest to the kind's own."""
        return next((name for name, group in reversed(self.options.items()) if option in group), None)


def registered(name: str, role: str | None = None) -> str | type:
    """What is registered under a name: a class or its dotted path.

    Args:
      name: of the kind.
      role: ``'mixer'`` or ``'ffn'``; None looks in both, which may have the name for one class alone: a group of
        ``model.layers`` says a kind, not its role.

    Raises:
      ConfigError: nothing is, or something else in each registry.
    """
    roles = REGISTRIES if role is None else (role,)
    found = {each: REGISTRIES[each][name] for each in roles if name in REGISTRIES[each]}
    if not found:
        raise ConfigError(f'{name!r} is no registered {role or "mixer or ffn"}; choose from {", ".join(names(role))}')
    if len(set(found.values())) > 1:
        both = ' and as '.join(f'{each} {kind}' for each, kind in found.items())
        raise ConfigError(f'{name!r} is registered as {both}; give one of them another name')
    return next(iter(found.values()))


def names(role: str | None = None) -> list[str]:
    """The registered names of a role, or of both, each once."""
    return list(dict.fromkeys(name for each in (REGISTRIES if role is None else (role,)) for name in REGISTRIES[each]))


def load(name: str, role: str | None = None) -> Any:
    """Imports the class of a kind, a ``Layer``; arguments as of ``registered``."""
    kind = registered(name, role)
    if isinstance(kind, type):
        return kind
    module, _, of_class = kind.rpartition('.')
    return getattr(importlib.import_module(module), of_class)


def describe(name: str, role: str | None = None) -> Description:
    """What a kind says of itself; arguments as of ``registered``.

    Raises:
      ConfigError: no such kind, its file cannot be read so, or it declares a statistic under a name that is taken.
    """
    kind = registered(name, role)
    found = declared.of_class(kind) if isinstance(kind, type) else declared.of_source(kind)
    if declared.CONTRACT not in [part.owner for part in found]:
        raise ConfigError(f'{name!r} is registered as {kind}, which does not derive from {declared.CONTRACT}')
    for part in found:
        for statistic in part.statistics:
            if (why := reported.refused('statistic', statistic)) is not None:
                raise ConfigError(f'{part.owner} declares {why}')
    return Description(found)


def groups() -> dict[str, dict[str, Option]]:
    """The groups of options of all registered kinds, below ``config.model``.

    Raises:
      ConfigError: two classes declare a group of one name, or one that the model has already, or are registered under
        one name.
    """
    owners: dict[str, str] = {}
    found: dict[str, dict[str, Option]] = {}
    for part in (part for name in names() for part in describe(name).declarations):
        for group, options in part.options.items():
            owner = owners.setdefault(group, part.owner)
            if owner != part.owner or group in OPTIONS['model']:
                other = 'the model' if group in OPTIONS['model'] else owner
                raise ConfigError(f'{part.owner} declares options {group!r}, which {other} has; take another name')
            found[group] = dict(options)
    return found
