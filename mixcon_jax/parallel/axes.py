"""The mesh axes by name, what each shares out, and how large they are. Loads no JAX."""

import difflib
import math
from collections.abc import Mapping

import ml_collections

from mixcon_jax.errors import ConfigError

# Outermost first. Neighbouring devices, those of one host, differ along the last axes, which exchange most.
AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
BATCH_AXES = ('data', 'fsdp', 'expert')  # the mesh axes that share out the rows of a batch
SEQUENCE_AXIS = 'context'  # the mesh axis that shares out the tokens of a row
APART_AXES = ('data',)  # the mesh axes along which train.sum_gradients='step' sums once: they split no parameters
ROWS = ' x '.join(f'mesh.{axis}' for axis in BATCH_AXES)  # in words
FEWER = 'CUDA_VISIBLE_DEVICES, or mesh.cpu_devices on a CPU, leaves out some'  # devices

Rules = Mapping[str, tuple[str, ...]]

# Logical axis -> mesh axes. A name that is absent stays whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    'batch': BATCH_AXES,
    'sequence': (SEQUENCE_AXIS,),
    'shards': (*BATCH_AXES, SEQUENCE_AXIS),
    'embed': ('fsdp',),
    'vocab': ('tensor',),
    'mlp': ('tensor',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'inner': ('tensor',),
    'gain': ('tensor',),
    'per_head': ('tensor',),  # of the narrow projections that give each head or group a few numbers
    'experts': ('expert',),
    'norm': (),
    'narrow': (),
    'terms': (),
    'filter': (),
    'conv': (),
    'dt_rank': (),
    'state': (),
}
# What `mesh.rules` may say. Rows and tokens are shared out as they are loaded; what is split inside a layer must not be
# along an axis that splits its tokens; experts are met by exchanging tokens between devices that hold different ones.
_PARAMETERS_ONLY = ('embed', 'norm', 'narrow', 'terms', 'filter', 'conv', 'dt_rank', 'state')
ALLOWED: dict[str, tuple[str, ...]] = {
    name: AXES if name in _PARAMETERS_ONLY else BATCH_AXES if name == 'experts' else ('tensor',)
    for name in RULES.keys() - {'batch', 'sequence', 'shards'}
}


def rules(mesh: ml_collections.ConfigDict) -> dict[str, tuple[str, ...]]:
    """The table with the changes of ``mesh.rules``, each ``'logical=axis+axis'``, or ``'logical='`` for whole.

    Raises:
      ConfigError: an unknown name, with the closest known one; or axes that cannot share that out.
    """
    table = dict(RULES)
    for text in mesh.get('rules', ()):
        logical, separator, names = (part.strip() for part in text.partition('='))
        where = f'mesh.rules: {text!r}'
        if not separator:
            raise ConfigError(f'{where} has no "="; write LOGICAL=AXIS+AXIS, or LOGICAL= for what no axis splits')
        _known(where, 'logical axis', logical, tuple(RULES))
        axes = tuple(name.strip() for name in names.split('+') if name.strip())
        for axis in axes:
            _known(where, 'mesh axis', axis, AXES)
        if logical not in ALLOWED:
            raise ConfigError(f'{where}: {logical} is shared out as it is loaded, over {", ".join(RULES[logical])}')
        if wrong := [axis for axis in axes if axis not in ALLOWED[logical]]:
            raise ConfigError(f'{where}: {wrong[0]} cannot split {logical}; choose from {", ".join(ALLOWED[logical])}')
        if len(set(axes)) < len(axes):
            raise ConfigError(f'{where} names an axis twice')
        table[logical] = axes
    if table['heads'] != table['kv_heads']:
        raise ConfigError('mesh.rules: heads and kv_heads belong together; give both the same axes')
    return table


def named(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that entries of a PartitionSpec name, outermost first."""
    found = {axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry or ())}
    return tuple(axis for axis in AXES if axis in found)


def _known(where: str, what: str, name: str, choices: tuple[str, ...]) -> None:
    if name not in choices:
        close = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f'{where} names an unknown {what} {name!r}; did you mean {close!r} (of {", ".join(choices)})?'
        )


def sizes(mesh: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """The size of every axis of ``config.mesh`` over so many devices; the one of -1 takes what the others leave.

    Raises:
      ConfigError: their product is not the number of devices, or several are -1.
    """
    found = {axis: mesh[axis] for axis in AXES}
    open_axes = [axis for axis in AXES if found[axis] == -1]
    if len(open_axes) > 1:
        both = ' and '.join(f'mesh.{axis}' for axis in open_axes)
        raise ConfigError(f'{both} are -1; one axis alone can take what the others leave: give the others a size')
    for axis in open_axes:
        found[axis] = max(1, devices // math.prod(size for size in found.values() if size != -1))
    taken = math.prod(found.values())
    if taken != devices:
        keys = ' * '.join(f'mesh.{axis} ({mesh[axis]})' for axis in AXES)
        hint = ', which the others must divide' if open_axes else ''
        raise ConfigError(
            f'the mesh takes {taken} devices: {keys} must be the number of devices, {devices}{hint}; {FEWER}'
        )
    return found


def across(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Into how many parts, of ``slices`` in all, data and fsdp are cut by a slow network: data as far as it goes.

    Raises:
      ConfigError: the slices do not divide them.
    """
    data = math.gcd(slices, sizes['data'])
    if sizes['fsdp'] % (slices // data):
        raise ConfigError(
            f'mesh.slices={slices} must divide mesh.data x mesh.fsdp = {sizes["data"]} x {sizes["fsdp"]}:'
            ' only these go across a slow network'
        )
    return {'data': data, 'fsdp': slices // data}


def rows(sizes: Mapping[str, int] | ml_collections.ConfigDict) -> int:
    """Into how many parts a mesh of these sizes splits the rows of a batch."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def shards(rules: Rules, sizes: Mapping[str, int], groups: int = 1) -> dict[str, int]:
    """Into how many parts a mesh of these sizes splits each logical axis; ``'apart'`` is the number of ``groups``."""
    return {name: math.prod(sizes[axis] for axis in axes) for name, axes in rules.items()} | {'apart': groups}


def groups(train: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> int:
    """How many groups of devices compute the microbatches of a step apart, each those of its own rows.

    Args:
      train: ``config.train``.
      sizes: the mesh's.
    """
    apart = train.sum_gradients == 'step' and train.accum_steps > 1
    return math.prod(sizes[axis] for axis in APART_AXES) if apart else 1


def check_groups(rules: Rules) -> None:
    """Refuses rules by which groups of devices would not have all parameters.

    Raises:
      ConfigError: names what is split along ``APART_AXES``.
    """
    for name in rules:
        if name in ALLOWED and (split := set(rules[name]) & set(APART_AXES)):
            raise ConfigError(
                f"train.sum_gradients='step' needs parameters that are whole along {split.pop()}, over which mesh.rules"
                f' splits {name}; choose another axis, or train.sum_gradients=microbatch'
            )
