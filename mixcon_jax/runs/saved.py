"""Checkpoints as files: which there are and what their metadata says. Loads no JAX, so that answers come at once."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ITEMS = ('model', 'optimizer', 'meta')
MODEL = ('params/', 'buffers/')  # of an array's name: what a model needs; all else is in the optimizer's item
UNFINISHED = '.orbax-checkpoint-tmp'  # in the name of a folder that is being written or deleted


class Damaged(Exception):
    """A checkpoint whose bytes are not those that were saved."""


def steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints of ``workdir/checkpoints``, ascending; none if there is no such folder."""
    try:
        return sorted(int(path.name) for path in Path(folder).iterdir() if re.fullmatch('[0-9]+', path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def contents(folder: str | Path, step: int) -> dict[str, Any]:
    """All that a checkpoint holds besides arrays, verified against its checksum.

    Raises:
      Damaged: it is not there, or not what was saved.
    """
    try:
        saved = json.loads((Path(folder) / str(step) / 'meta' / 'metadata').read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f'meta: {type(error).__name__}: {error}'[:160]) from error
    try:
        found = saved['contents']
        if saved['sha256'] != digest(found) or found['step'] != step:
            raise Damaged('its metadata does not match its checksum')
    except (KeyError, TypeError) as error:
        raise Damaged(f'its metadata lacks {error}') from error
    return found


def newest(folder: str | Path) -> dict[str, Any] | None:
    """``contents`` of the newest checkpoint that still has them, or None."""
    for step in reversed(steps(folder)):
        try:
            return contents(folder, step)
        except Damaged:
            continue
    return None


def is_whole(folder: str | Path, step: int) -> bool:
    """Whether nothing of a checkpoint is missing at first sight; its arrays are read only when it is restored."""
    try:
        contents(folder, step)
    except Damaged:
        return False
    return all((Path(folder) / str(step) / item).is_dir() for item in ITEMS)


def digest(contents: Mapping[str, Any]) -> str:
    """SHA-256 of what a checkpoint holds besides arrays."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
