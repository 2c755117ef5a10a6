"""Arrays of a checkpoint, read from disk onto devices so that the host never holds many of them at once."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mixcon_jax.runs import readback, stored
from mixcon_jax.runs.checksums import checksums
from mixcon_jax.runs.saved import Damaged

Arrays = dict[str, jax.Array]
IN_FLIGHT = 512 << 20  # bytes that a process reads at once, unless one device's part of one array takes more


def restore(item: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of an item, each device getting its part as soon as that is read; every process must call it.

    Args:
      item: the item's folder.
      wanted: its arrays by name, with shardings.

    Raises:
      Damaged: whatever goes wrong inside Orbax, for its files are at fault.
    """
    try:
        # Orbax counts a part's bytes while it reads and places it, and refuses one that is not below its limit.
        limit = max(IN_FLIGHT, *(_most(item, name, array) for name, array in wanted.items()), 0) + 1
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=limit / 10**9)  # type: ignore[arg-type]
        return handler.restore(item, args=ocp.args.StandardRestore(dict(wanted)))
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # out of memory says nothing about the files
    except Exception as error:
        raise Damaged(f'{item.name}: {type(error).__name__}: {readback.first_line(error)}') from error


def _most(item: Path, name: str, wanted: jax.ShapeDtypeStruct) -> int:
    """Bytes of all that must be read for one device's part of an array: the parts that it was written in are whole."""
    if math.prod(wanted.shape) * np.dtype(wanted.dtype).itemsize < IN_FLIGHT:
        return 0
    array = stored.open_array(item, name)
    sizes = array.chunk_layout.read_chunk.shape or ()

    def touched(index: tuple[slice, ...]) -> int:
        spans: Any = zip(index, array.shape, sizes, strict=True)
        ends = ((each.start or 0, size if each.stop is None else each.stop, chunk) for each, size, chunk in spans)
        return math.prod((-(-stop // chunk) - start // chunk) * chunk for start, stop, chunk in ends)

    indices = wanted.sharding.addressable_devices_indices_map(tuple(wanted.shape)).values()
    return max(map(touched, indices)) * array.dtype.numpy_dtype.itemsize


def verified[T](read: Callable[[], tuple[T, Arrays, Mapping[str, str]]]) -> tuple[T, Arrays]:
    """What ``read`` gives, by its checksums; with several processes, all have read it or all take it as damaged.

    They agree before the checksums, which they add up together.

    Args:
      read: something about a checkpoint, its arrays and their checksums, by name.

    Raises:
      Damaged: one of them could not read it, or an array is not what was saved.
    """
    found, reason = None, ''
    try:
        found = read()
    except Damaged as error:
        reason = str(error)
    intact = found is not None
    if jax.process_count() > 1:
        intact = bool(np.all(multihost_utils.process_allgather(np.array(intact))))
    if found is None or not intact:
        raise Damaged(reason or 'another process could not read it')
    what, arrays, saved = found
    for name, checksum in checksums(arrays).items():
        if saved[name] != checksum:
            raise Damaged(f'{name} does not match its checksum')
    return what, arrays
