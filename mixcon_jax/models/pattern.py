"""What a pattern means: its layers, their parts, and the options that each part reads.

A pattern calls a mixer or an FFN by the name of its kind, or by that of a group of ``model.layers``, as
``model.layers.local = dict(kind='attention', rope=True)`` for ``'local+mlp'``. Such a part reads the model's options
with those of the group in their place. Free of JAX.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

from mixcon_jax.errors import ConfigError
from mixcon_jax.models import kinds
from mixcon_jax.options import Option, Statistic

KIND = Option('', 'Mixer or FFN whose options the group gives.')
Groups = Mapping | ml_collections.ConfigDict


class LayerSpec(NamedTuple):
    """One layer of a pattern."""

    mixer: str
    ffn: str  # '' for none
    parallel: bool


@dataclasses.dataclass(frozen=True)
class Part:
    """A mixer or an FFN of a pattern's layer.

    Attributes:
      name: what the pattern calls it.
      role: ``'mixer'`` or ``'ffn'``.
      kind: the name of its class in the registry of that role.
      model: ``config.model`` as this part reads it.
    """

    name: str
    role: str
    kind: str
    model: Any

    def load(self) -> Any:
        """Imports its class, a ``Layer``."""
        return kinds.load(self.kind, self.role)

    def describe(self) -> kinds.Description:
        return kinds.describe(self.kind, self.role)


def parse_layer(text: str, named: Mapping[str, str] | None = None) -> LayerSpec:
    """Reads ``'mixer'``, ``'mixer+ffn'`` or ``'mixer|ffn'``.

    Args:
      text: a layer of a pattern.
      named: ``{name: kind}`` of the groups in ``model.layers``.

    Raises:
      ValueError: an unknown name, with the closest known one.
    """
    parallel = '|' in text
    mixer, separator, ffn = text.partition('|' if parallel else '+')
    _known(mixer, 'mixer', named or {}, text)
    if separator:
        _known(ffn, 'ffn', named or {}, text)
    return LayerSpec(mixer, ffn, parallel)


def _known(name: str, role: str, named: Mapping[str, str], text: str) -> None:
    registry = kinds.REGISTRIES[role]
    if name in named and named[name] not in registry:
        raise ValueError(f'layer {text!r} has {name!r} for its {role}, but model.layers.{name} is no {role}')
    choices = [*registry, *(other for other, kind in named.items() if kind in registry)]
    if name not in choices:
        close = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]
        raise ValueError(
            f'layer {text!r} names an unknown {role} {name!r}; did you mean {close!r} (of {", ".join(choices)})?'
        )


def named_kinds(model) -> dict[str, str]:
    """``{name: kind}`` of the groups in ``model.layers``."""
    return {name: options.get('kind', '') for name, options in model.get('layers', {}).items()}


def parts(model, text: str) -> dict[str, Part]:
    """The parts of a pattern's layer by role, ``mixer`` first."""
    named = named_kinds(model)
    spec = parse_layer(text, named)
    called = {'mixer': spec.mixer} | ({'ffn': spec.ffn} if spec.ffn else {})
    return {role: Part(name, role, named.get(name, name), variant(model, name)) for role, name in called.items()}


def variant(model, name: str):
    """``config.model`` as the part of this name reads it: itself, unless ``model.layers`` has the name."""
    if name not in named_kinds(model):
        return model
    values = model.to_dict()
    description = kinds.describe(named_kinds(model)[name])
    given = {option: value for option, value in values['layers'][name].items() if option != 'kind'}
    for option, value in given.items():
        if (group := description.group_of(option)) is None:
            raise ConfigError(f'unknown option model.layers.{name}.{option}')
        values[group][option] = value
    return type(model)(values)


# ---------------------------------------------------------------------------------------------------------------------
# For the configuration
# ---------------------------------------------------------------------------------------------------------------------
def named_options(layers: Any) -> dict[str, Option]:
    """``{'name.option': option}`` of all that the groups in ``model.layers`` may set, where their kind is known."""
    found = {}
    for name, given in layers.items() if isinstance(layers, Groups) else ():
        found[f'{name}.kind'] = KIND
        kind = given.get('kind') if isinstance(given, Groups) else None
        if isinstance(kind, str) and kind in kinds.names():
            for options in kinds.describe(kind).options.values():  # of two options of one name the later group's
                found |= {f'{name}.{option}': node for option, node in options.items()}
    return found


def check_names(layers: Any) -> None:
    """Refuses groups in ``model.layers`` that no pattern could mean.

    Raises:
      ConfigError: names the group.
    """
    registered = kinds.names()
    for name, given in layers.items():
        key = f'model.layers.{name}'
        if not name.isidentifier():
            raise ConfigError(f'{key}: {name!r} cannot stand in a pattern; take letters, digits and _')
        if name in registered:
            raise ConfigError(f'{key} has the name of a kind of layer; take another name')
        if not isinstance(given, Groups) or not isinstance(given.get('kind'), str):
            raise ConfigError(f"{key} has no kind; write {key} = dict(kind='{registered[0]}', ...)")
        if given['kind'] not in registered:
            close = difflib.get_close_matches(given['kind'], registered, n=1, cutoff=0.0)[0]
            raise ConfigError(f'{key}.kind={given["kind"]!r} is no mixer or ffn; did you mean {close!r}?')


def check(model) -> None:
    """Refuses patterns and options of their parts that do not go together.

    Args:
      model: ``config.model``, nothing derived yet.

    Raises:
      ConfigError: names the key.
    """
    _check_parts(model, lambda part: part.describe().check(part.model))


def check_split(model, shards: Mapping[str, int]) -> None:
    """Refuses options of a pattern's parts that a mesh cannot share out.

    Args:
      model: ``config.model``; what is to be derived is.
      shards: into how many parts the mesh splits each logical axis, and ``'apart'``, as ``axes.shards`` has them.

    Raises:
      ConfigError: names the key.
    """
    if any(parts > 1 for parts in shards.values()):
        _check_parts(resolve(model), lambda part: part.describe().check_split(part.model, shards))


def _check_parts(model, check_part: Callable[[Part], None]) -> None:
    for text in model.pattern:
        try:
            found = parts(model, text)
        except ValueError as error:
            raise ConfigError(f'model.pattern: {error}') from error
        for part in found.values():
            try:
                check_part(part)
            except ConfigError as error:
                raise ConfigError(
                    f'model.layers.{part.name}: {error}' if part.name != part.kind else str(error)
                ) from error


def resolve(model) -> ml_collections.ConfigDict:
    """Returns a copy of ``config.model`` in which every 0 or () that means "derive it" is spelled out.

    So is, in a group of ``model.layers``, what follows from the group's own options.
    """
    resolved = _derived(model)
    for name, kind in named_kinds(model).items():
        description, own, given = kinds.describe(kind), _derived(variant(model, name)), resolved.layers[name]
        for option in dict.fromkeys(option for options in description.options.values() for option in options):
            group = description.group_of(option)
            follows = description.options[group][option].derive is not None
            if follows and (option in given or own[group][option] != resolved[group][option]):
                given[option] = own[group][option]
    return resolved


def _derived(model) -> ml_collections.ConfigDict:
    """A copy of the model's configuration whose derived options are spelled out, in the table's order."""
    model = ml_collections.ConfigDict(model.to_dict())
    for name, options in kinds.groups().items():
        for key, option in options.items():
            if option.derive is not None and not model[name][key]:
                model[name][key] = option.derive(model)
    return model


def statistics(pattern: Any, layers: Any) -> dict[str, Statistic]:
    """The statistics that a model's parts report; of every registered kind where the pattern cannot be read.

    Args:
      pattern: ``model.pattern`` as a run's config.json has it.
      layers: ``model.layers``, likewise.
    """
    groups = layers.items() if isinstance(layers, Mapping) else ()
    named = {name: given.get('kind') for name, given in groups if isinstance(given, Mapping)}
    called = [name for text in pattern if isinstance(text, str) for name in text.replace('|', '+').split('+')]
    used = [kind for name in called if (kind := named.get(name, name)) in kinds.names()] or kinds.names()
    return {name: statistic for kind in used for name, statistic in kinds.describe(kind).statistics.items()}
