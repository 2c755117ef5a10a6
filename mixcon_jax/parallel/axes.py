"""The mesh axes by name, what each shares out, and how large they are. Loads no JAX."""

import math
from collections.abc import Mapping

import ml_collections

from mixcon_jax.errors import ConfigError

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
BATCH_AXES = ('data', 'fsdp')  # the mesh axes that share out the rows of a batch
SEQUENCE_AXIS = 'context'  # the mesh axis that shares out the tokens of a row

# Logical axis -> mesh axes. A name that is absent stays whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    'batch': BATCH_AXES,
    'sequence': (SEQUENCE_AXIS,),
    'shards': (*BATCH_AXES, SEQUENCE_AXIS),
    'embed': ('fsdp',),
    'mlp': ('tensor',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'inner': ('tensor',),
    'vocab': ('tensor',),
    'experts': ('expert',),
}


def sizes(mesh: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """The size of every axis of ``config.mesh`` over so many devices; ``data=-1`` takes what the others leave.

    Raises:
      ConfigError: their product is not the number of devices.
    """
    found = {axis: mesh[axis] for axis in AXES}
    if found['data'] == -1:
        found['data'] = max(1, devices // math.prod(found[axis] for axis in AXES[1:]))
    taken = math.prod(found.values())
    if taken != devices:
        keys = ' * '.join(f'mesh.{axis} ({mesh[axis]})' for axis in AXES)
        hint = ', which the others must divide' if mesh['data'] == -1 else ''
        raise ConfigError(f'the mesh takes {taken} devices: {keys} must be the number of devices, {devices}{hint}')
    return found


def rows(sizes: Mapping[str, int] | ml_collections.ConfigDict) -> int:
    """Into how many parts a mesh of these sizes splits the rows of a batch."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)
