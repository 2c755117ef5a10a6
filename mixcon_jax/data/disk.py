"""Whole or not at all: locks, durable writes, and failures of the disk in words."""

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from mixcon_jax.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what some network file systems answer


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'waiting for another process that is preparing {path}')
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            say(f'no locks in {folder}: processes that prepare the same text at the same time each do the whole work')
            yield False
            return
        yield True


def scratch(path: Path) -> Path:
    """A name beside ``path`` that no other process uses, on whatever host."""
    return path.with_name(f'{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}')


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
