"""Checkpoints as files: which there are and what their metadata says. Loads no JAX, so that answers come at once."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixcon_jax.errors import UserError
from mixcon_jax.host import system
from mixcon_jax.host.files import write_whole
from mixcon_jax.parsing import json_file, json_object

ARRAYS = ('model', 'optimizer')  # the items that hold arrays
ITEMS = (*ARRAYS, 'meta')
FILES = 'meta/files'  # of a checkpoint: which files it consists of, and their sizes
MODEL = ('params/', 'buffers/')  # of an array's name: what a model needs; all else is in the optimizer's item
UNFINISHED = '.orbax-checkpoint-tmp'  # in the name of a folder that is being written or deleted


class Damaged(Exception):
    """A checkpoint whose bytes are not those that were saved."""


class Missing(Damaged):
    """A checkpoint of which nothing is there that says what it holds."""


def refusal(path: Path, error: BaseException | None) -> UserError | None:
    """The error of a checkpoint that may be intact, but that the system does not let this process read.

    Args:
      path: the checkpoint's folder.
      error: what went wrong. Its errno counts, or that of any of its causes; that nothing is there is no refusal,
        unless the checkpoint is a link that leads nowhere.
    """
    lost = path.is_symlink() and not path.exists()
    reason = 'a link that leads nowhere' if lost else system.refusal(error)
    if not reason:
        return None
    return UserError(
        f'{path} cannot be read ({reason}); it stays as it is: see to the disk and run again, or move it away to do'
        ' without it'
    )


def names(folder: str | Path) -> list[str]:
    """What lies in ``workdir/checkpoints``, by name; nothing if there is no such folder.

    Raises:
      UserError: there is one, but it cannot be read: a link to itself, a disk that has gone, no permission.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f'{folder} cannot be read ({os.strerror(error.errno or 0)})') from error


def steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints of ``workdir/checkpoints``, ascending; errors as of ``names``."""
    return sorted(int(name) for name in names(folder) if re.fullmatch('[0-9]+', name))


def item_of(name: str) -> str:
    """The item that holds the array of this name."""
    return 'model' if name.startswith(MODEL) else 'optimizer'


def contents(folder: str | Path, step: int) -> dict[str, Any]:
    """All that a checkpoint holds besides arrays, verified against its checksum.

    Raises:
      Damaged: it is not there, or not what was saved.
      UserError: it cannot be read.
    """
    path = Path(folder) / str(step)
    try:
        saved = json_object((path / 'meta' / 'metadata').read_bytes())
    except (OSError, ValueError) as error:
        if refused := refusal(path, error):
            raise refused from error
        kind = Missing if isinstance(error, OSError) else Damaged
        raise kind(f'meta: {type(error).__name__}: {error}'[:160]) from error
    try:
        found = saved['contents']
        if saved['sha256'] != digest(found) or found['step'] != step:
            raise Damaged('its metadata does not match its checksum')
    except (KeyError, TypeError, RecursionError) as error:
        raise Damaged(f'its metadata lacks {error}') from error
    return found


def newest(folder: str | Path) -> dict[str, Any] | None:
    """``contents`` of the newest checkpoint that still has them, or None.

    Raises:
      UserError: it, or the folder, cannot be read.
    """
    for step in reversed(steps(folder)):
        try:
            return contents(folder, step)
        except Damaged:
            continue
    return None


def note_files(folder: str | Path, step: int) -> None:
    """Notes names and sizes of a checkpoint's files beside its checksums, for ``is_whole``."""
    path = Path(folder) / str(step) / FILES
    write_whole(path, json.dumps(_files(path.parents[1])).encode())


def is_whole(folder: str | Path, step: int) -> bool:
    """Whether nothing of a checkpoint is missing or cut short; its arrays are read only when it is restored.

    What cannot be read, or goes meanwhile, is missing.
    """
    checkpoint = Path(folder) / str(step)
    try:
        contents(folder, step)
    except (Damaged, UserError):
        return False
    noted = json_file(checkpoint / FILES)
    if not noted:  # of an earlier version, or killed before it was noted
        manifests = [checkpoint / item / 'manifest.ocdbt' for item in ARRAYS]
        return all(_size(path) for path in manifests)
    found = _files(checkpoint)
    return all(found.get(name) == size for name, size in noted.items())


def _files(checkpoint: Path) -> dict[str, int]:
    """The size of every file in a checkpoint's folder, by its path there."""
    found = {}
    for folder, _, files in os.walk(checkpoint):
        for path in (Path(folder) / name for name in files):
            if path != checkpoint / FILES and (size := _size(path)) is not None:
                found[path.relative_to(checkpoint).as_posix()] = size
    return found


def _size(path: Path) -> int | None:
    """Bytes of a file; None if it is not there, as one that is being deleted, or is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def digest(contents: Mapping[str, Any]) -> str:
    """SHA-256 of what a checkpoint holds besides arrays."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
