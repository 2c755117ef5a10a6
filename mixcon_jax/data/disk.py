"""Whole or not at all: locks, durable writes, and failures of the disk in words."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mixcon_jax.errors import UserError


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of ``path``; the system releases it when the process dies.

    The lock's file stays: removing it would let two processes hold locks on two files of the same name.
    """
    folder = path.parent / '.locks'
    folder.mkdir(exist_ok=True)
    with open(folder / path.name, 'w', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'waiting for another process that is preparing {path}')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Makes files and names durable, so that the rename that follows never exposes missing bytes."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


@contextlib.contextmanager
def explained(cache: Path) -> Iterator[None]:
    """Turns failures of the disk into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # TensorStore raises ValueError and the like, with the system's words in the message.
        if code in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            raise UserError(
                f'data.cache_dir: {cache}: disk full; nothing half-written is left; free space or choose another folder'
            ) from error
        if code is not None:
            raise UserError(f'data.cache_dir: {cache}: cannot write here ({os.strerror(code)})') from error
        raise
