"""Making the device mesh of a configuration."""

from collections.abc import Sequence

import jax
import ml_collections
from jax.sharding import AxisType, Mesh

from mixcon_jax.errors import ConfigError
from mixcon_jax.parallel.axes import AXES, ROWS, rows, sizes


def make_mesh(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of ``config.mesh`` over all devices; the axis of -1 takes what the others leave.

    Devices are laid out in their order, those of one host side by side: they differ along the last axes.

    Raises:
      ConfigError: the axes' product is not the number of devices, or devices that share rows are of several processes.
    """
    devices = jax.devices() if devices is None else devices
    shape = sizes(config, len(devices))
    # Every process loads rows of its own.
    if rows(shape) % jax.process_count():
        raise ConfigError(
            f'{ROWS} ({rows(shape)}) must be a multiple of the number of processes,'
            f' {jax.process_count()}: the devices along the other axes belong to one process'
        )
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
