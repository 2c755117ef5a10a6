"""Whole or not at all: locks, durable writes, and failures of the disk in words."""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from mixcon_jax.errors import UserError
from mixcon_jax.host import locks


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Holds the lock of ``path``; the system releases it when the process dies.

    The lock's file stays: removing it would let two processes hold locks on two files of the same name.

    Yields:
      Whether there is a lock; where the file system has none, others may be at work on ``path`` at the same time.
    """
    folder = path.parent / '.locks'
    folder.mkdir(exist_ok=True)
    with open(folder / path.name, 'w', encoding='utf-8') as file:
        held = locks.take(file)
        if held is False:
            say(f'waiting for another process that is preparing {path}')
            held = locks.take(file, wait=True)
        elif held is None:
            say(f'no locks in {folder}: processes that prepare the same text at the same time each do the whole work')
        yield bool(held)


def scratch(path: Path) -> Path:
    """A name beside ``path`` that no other process uses, on whatever host."""
    return path.with_name(f'{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}')


def move_aside(path: Path) -> Path:
    """Renames what is at ``path``, so that nobody meets it half deleted; where it went, if it was there."""
    aside = scratch(path)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.rename(path, aside)
    return aside


def move_into_place(temporary: Path, path: Path) -> None:
    """Renames a folder to ``path``; if another process was faster, as without locks it may be, its folder stays."""
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


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
