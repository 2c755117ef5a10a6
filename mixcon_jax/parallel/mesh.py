"""Making the device mesh of a configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh

from mixcon_jax.errors import ConfigError
from mixcon_jax.parallel.axes import AXES, across, sizes


def make_mesh(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of ``config.mesh`` over all devices; the axis of -1 takes what the others leave.

    Raises:
      ConfigError: the axes' product is not the number of devices, or ``mesh.slices`` does not fit them.
    """
    devices = jax.devices() if devices is None else devices
    shape = sizes(config, len(devices))
    return Mesh(arrange(devices, shape, config.slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[Any], shape: Mapping[str, int], slices: int = 1) -> np.ndarray:
    """Devices by their place on the mesh, ``[data, fsdp, expert, context, tensor]``.

    Those of a process lie side by side, and those of one network too: neighbours differ along the last axes. Within a
    process they keep their order. Where a slow network joins ``slices`` islands, data and then fsdp go across it, in
    as few parts as that takes, and every other axis stays within an island.

    Args:
      devices: of anything that has a ``process_index`` and, where it is known, a ``slice_index``.
      shape: size of every axis, ``axes.sizes``.
      slices: islands, of as many devices each.

    Raises:
      ConfigError: they do not divide data x fsdp, or a process would be of two islands.
    """
    split = across(shape, slices)
    ordered = np.empty(len(devices), object)
    ordered[:] = sorted(devices, key=_network)  # a stable sort
    islands = ordered.reshape(slices, -1)
    of = [{device.process_index for device in island} for island in islands]
    if len(set().union(*of)) > 1 and sum(map(len, of)) > len(set().union(*of)):
        raise ConfigError(f'mesh.slices={slices} would cut a process in two: give a number that divides the hosts')
    inside = [shape[axis] // split.get(axis, 1) for axis in AXES]
    grid = ordered.reshape(split['data'], split['fsdp'], *inside)
    return grid.transpose(0, 2, 1, 3, 4, 5, 6).reshape(tuple(shape[axis] for axis in AXES))


def crossing(devices: np.ndarray) -> tuple[str, ...]:
    """The axes of a mesh's devices whose exchanges leave a process."""
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(devices)
    return tuple(name for axis, name in enumerate(AXES) if np.any(np.diff(processes, axis=axis)))


def _network(device: Any) -> tuple[int, int]:
    """What devices near one another have in common."""
    return getattr(device, 'slice_index', None) or 0, device.process_index
