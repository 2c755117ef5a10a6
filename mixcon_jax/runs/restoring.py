"""Arrays of a checkpoint, read from disk onto devices so that the host never holds many of them at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mixcon_jax.errors import UserError, first_line
from mixcon_jax.host import processes
from mixcon_jax.runs import saved, stored
from mixcon_jax.runs.checksums import checksums
from mixcon_jax.runs.saved import Damaged, Missing

Arrays = dict[str, jax.Array]
KINDS = (UserError, Missing, Damaged)  # how a checkpoint may not be read; a Missing is a Damaged, too
IN_FLIGHT = 512 << 20  # bytes that a process reads at once, unless one device's part of one array takes more


def restore(item: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of an item, each device getting its part as soon as that is read; every process must call it.

    Args:
      item: the item's folder.
      wanted: its arrays by name, with shardings.

    Raises:
      Damaged: whatever goes wrong inside Orbax, for its files are at fault.
      UserError: the system does not let this process read them.
    """
    try:
        # Orbax counts a part's bytes while it reads and places it, and refuses one that is not below its limit.
        limit = max(IN_FLIGHT, *(_most(item, name, array) for name, array in wanted.items()), 0) + 1
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=limit / 10**9)  # type: ignore[arg-type]
        return handler.restore(item, args=ocp.args.StandardRestore(dict(wanted)))
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # out of memory says nothing about the files
    except Exception as error:
        if refused := saved.refusal(item.parent, error):
            raise refused from error
        raise Damaged(f'{item.name}: {type(error).__name__}: {first_line(error)[:160]}') from error


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
    """What ``read`` gives, by its checksums; with several processes, all have read it or all give it up.

    They agree before the checksums, which they add up together. What one of them cannot read, or does not find though
    others do, is not damaged: its disk may not be there.

    Args:
      read: something about a checkpoint, its arrays and their checksums, by name.

    Raises:
      Damaged: it is not what was saved.
      UserError: it is of another model, or one of them cannot read it.
    """
    found, failure = None, None
    try:
        found = read()
    except (Damaged, UserError) as error:
        failure = error
    reasons = processes.of_each('' if failure is None else f'{_kind(failure)}:{failure}')
    if found is None or any(reasons):
        raise _judged(reasons) from failure
    what, arrays, expected = found
    for name, checksum in checksums(arrays).items():
        if expected[name] != checksum:
            raise Damaged(f'{name} does not match its checksum')
    return what, arrays


def require_equal(wanted: Mapping[str, list], found: Mapping[str, list], step: int) -> None:
    """Refuses a checkpoint of another model; both map the name of an array to [type, shape].

    Raises:
      UserError: names the first array that differs.
    """
    for name in sorted(wanted.keys() | found.keys()):
        ours, theirs = wanted.get(name), found.get(name)
        if ours != theirs:
            raise UserError(f'checkpoint {step} has {_shape(theirs)} for {name}, but the run has {_shape(ours)}')


def _shape(entry: list | None) -> str:
    return 'nothing' if entry is None else f'{entry[0]}{entry[1]}'


def _kind(failure: Damaged | UserError) -> str:
    return next(kind.__name__ for kind in KINDS if isinstance(failure, kind))


def _judged(reasons: Sequence[str]) -> Damaged | UserError:
    """What it means that some processes could not read a checkpoint, by the kind and the words of each one's error."""
    kinds, words = zip(*(reason.partition(':')[::2] for reason in reasons), strict=True)
    by = lambda index: f' (process {index} of {len(reasons)})' if len(reasons) > 1 else ''
    kind = next(kind for kind in KINDS if kind.__name__ in kinds)  # the first that there is decides
    index = kinds.index(kind.__name__)
    if kind is Missing and not all(kinds):
        return UserError(f'a checkpoint that other processes have is not there{by(index)}: must its disk be mounted?')
    return (UserError if kind is UserError else Damaged)(words[index] + by(index))
