"""Reading a save back: what it wrote is compared with what it was to write, on the host, part by part.

Nothing of the library that wrote it takes part in that, so whatever went wrong there, or below, is noticed while older
checkpoints are still there and before a run ends with nothing to load. That library then reads what it will need to
load it: it must find the same arrays.
"""

import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mixcon_jax.errors import UserError, first_line
from mixcon_jax.host.ambient import processors
from mixcon_jax.runs import saved, stored
from mixcon_jax.runs.checksums import checksum
from mixcon_jax.runs.saved import ARRAYS, Damaged, item_of

READERS = min(8, max(1, processors() // 4))  # arrays at once: a run needs processors for its batches, too
# Of a path: characters that no library takes for a pattern, an escape or a part of a URL.
PLAIN = re.compile(r'[\w ./+=,@:~()-]*')


class PlainPath:
    """A path of a folder that libraries take as it is: the folder's own or, as with ``[`` in it, that of a link to it.

    To be used in ``with``, at whose end the link goes.

    Attributes:
      path: the path.

    Raises:
      UserError: the system's folder for temporary files has such a path too.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._folder = folder, folder
        if PLAIN.fullmatch(str(folder)):
            return
        scratch = tempfile.mkdtemp(prefix='mixcon-')
        self.path = Path(scratch) / 'checkpoints'
        if not PLAIN.fullmatch(scratch):
            os.rmdir(scratch)
            raise UserError(f'neither {folder} nor {scratch} is a path that can be saved to; set TMPDIR to a plain one')
        self.path.symlink_to(folder)

    def mend(self) -> None:
        """Makes the link anew if it is gone: temporary files are cleared away, and a library would make a folder there.

        Raises:
          OSError: it cannot be made, as where someone else has taken its place.
        """
        if self.path == self._folder or (self.path.is_symlink() and self.path.readlink() == self._folder):
            return
        self._remove()
        self.path.parent.mkdir(mode=0o700)
        self.path.symlink_to(self._folder)

    def _remove(self) -> None:
        """Removes the folder of the link, with what a library may have made in its place."""
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def __enter__(self) -> 'PlainPath':
        return self

    def __exit__(self, *_: object) -> None:
        if self.path != self._folder:
            self._remove()


class Interrupted(Exception):
    """Reading back was given up before its end."""


def verify(folder: Path, step: int, digest: str, hurry: threading.Event) -> None:
    """Reads a checkpoint back, several arrays at once where there are processors to spare.

    Args:
      folder: ``workdir/checkpoints``.
      step: of the checkpoint.
      digest: ``saved.digest`` of what it was to hold besides arrays, their checksums among it.
      hurry: once it is set, reading ends.

    Raises:
      Damaged: it does not hold that, or cannot be loaded.
      Interrupted: in a hurry.
    """
    contents = saved.contents(folder, step)
    if saved.digest(contents) != digest:
        raise Damaged('its metadata is not what was saved')
    arrays = {item: {n: kind for n, kind in contents['arrays'].items() if item_of(n) == item} for item in ARRAYS}
    # One of its own: what was written through another may have gone elsewhere.
    with PlainPath(folder) as plain, ThreadPoolExecutor(READERS, 'read back') as readers:
        place = plain.path / str(step)
        tasks = [
            readers.submit(_require_intact, place / item, name, kind, contents['checksums'][name], hurry)
            for item, kinds in arrays.items()
            for name, kind in kinds.items()
        ]
        try:
            for task in tasks:
                task.result()
        finally:
            readers.shutdown(cancel_futures=True)
        for item, kinds in arrays.items():
            _require_loadable(place / item, kinds)


def _require_intact(item: Path, name: str, kind: list, expected: str, hurry: threading.Event) -> None:
    """Refuses an item that does not hold the array of this name, of this type and shape and with this checksum.

    Raises:
      Damaged: as said.
      Interrupted: in a hurry.
    """

    def chunks(array: Any) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        for chunk in stored.chunks(array):
            if hurry.is_set():
                raise Interrupted
            yield chunk

    try:
        array = stored.open_array(item, name)
        found = [str(array.dtype.numpy_dtype), list(array.shape)]
        intact = found == kind and checksum(chunks(array), array.shape) == expected
    except Interrupted:
        raise
    except Exception as error:  # whatever TensorStore finds
        if refused := saved.refusal(item.parent, error):
            raise refused from error
        raise Damaged(f'{name}: {type(error).__name__}: {first_line(error)[:160]}') from error
    if not intact:
        raise Damaged(f'{name} does not match its checksum')


def _require_loadable(item: Path, arrays: Mapping[str, list]) -> None:
    """Refuses an item that Orbax cannot load although its arrays are intact.

    Orbax reads all of its own metadata before it loads any array, so to load the smallest one shows that they hold.

    Args:
      item: the item's folder.
      arrays: type and shape of each array of it, by name.

    Raises:
      Damaged: the metadata cannot be read, or are of other arrays.
    """
    if not arrays:
        return
    handler, host = ocp.PyTreeCheckpointHandler(), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    smallest = min(arrays, key=lambda name: math.prod(arrays[name][1]))
    try:
        found = {name: [str(np.dtype(it.dtype)), list(it.shape)] for name, it in handler.metadata(item).items()}
        args = {smallest: ocp.ArrayRestoreArgs(sharding=host)}
        handler.restore(item, args=ocp.args.PyTreeRestore({smallest: 0}, args, partial_restore=True))
    except (jax.errors.JaxRuntimeError, MemoryError):
        return  # out of memory, which says nothing about the files
    except Exception as error:  # whatever Orbax finds
        if refused := saved.refusal(item.parent, error):
            raise refused from error
        raise Damaged(f'{item.name}: {type(error).__name__}: {first_line(error)[:160]}') from error
    if found != arrays:
        raise Damaged(f'the metadata of {item.name} are of other arrays')
