"""Whole or not at all: locks, durable writes, and failures of the disk in words."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from mixcon_jax.errors import UserError
from mixcon_jax.host import locks, system

SCRATCH = '.tmp-'  # in the name of a folder that is being written or deleted
# Names of ``scratch`` for stores and tokenizers, and what they were before they had the host in them.
LEFT = re.compile(
    r'.*-[0-9a-f]{16}(\.json)?\.tmp-([\w-]+\.)?\d+-[0-9a-f]{8}|\..*-[0-9a-f]{16}\.json\.\d+-[0-9a-f]{8}\.tmp'
)
FORGOTTEN = 24 * 3600  # seconds after which nobody is still writing there


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Holds the lock of ``path``; the system releases it when the process dies.

    The lock's file stays: removing it would let two processes hold locks on two files of the same name.

    Yields:
      Whether there is a lock; where the file system has none, others may be at work on ``path`` at the same time.
    """
    folder = path.parent / '.locks'
    folder.mkdir(exist_ok=True)
    _share(folder, path.parent)
    with _opened(folder / path.name) as file:
        _share(folder / path.name, path.parent)
        held = locks.take(file)
        if held is False:
            say(f'waiting for another process that is preparing {path}')
            held = locks.take(file, wait=True)
        elif held is None:
            say(f'no locks in {folder}: processes that prepare the same text at the same time each do the whole work')
        yield bool(held)


def _opened(path: Path) -> IO[Any]:
    """Opens a lock's file, which is made if it is not there.

    Not asked to make it, the system lets one open another user's in a folder for all.
    """
    with contextlib.suppress(FileNotFoundError):
        return open(path, 'r+', encoding='utf-8')
    return open(path, 'a', encoding='utf-8')


def _share(path: Path, cache: Path) -> None:
    """Lets all who may write to the cache take a lock there, where it is this user's to do so."""
    others = stat.S_IMODE(cache.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO | stat.S_ISVTX)
    status = path.stat()
    if status.st_uid == os.geteuid():
        with contextlib.suppress(OSError):  # a file system may have no modes
            path.chmod(stat.S_IMODE(status.st_mode) | (others if path.is_dir() else others & 0o066))


def scratch(path: Path) -> Path:
    """A name beside ``path`` that no other process uses, on whatever host; ``sweep`` knows it by it."""
    return path.with_name(f'{path.name}{_of_host()}{os.getpid()}-{secrets.token_hex(4)}')


def sweep(path: Path) -> None:
    """Deletes what processes that died have left in the folder of ``path``, whose lock this one holds.

    Of scratch names of ``path`` those that were made on this host. Where locks do not reach from host to host, others
    may be at work: of theirs, and of all other paths', those where nothing has been written for a day.
    """
    for left in filter(lambda path: LEFT.fullmatch(path.name), path.parent.iterdir()):
        if left.name.startswith(f'{path.name}{_of_host()}') or time.time() - _touched(left) > FORGOTTEN:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # another user's
                    left.unlink()


def _of_host() -> str:
    return SCRATCH + re.sub(r'[^\w]', '-', socket.gethostname()) + '.'


def _touched(path: Path) -> float:
    """When something was last written to a file or below a folder; now, where others are deleting."""
    below = (Path(top, name) for top, _, names in os.walk(path) for name in ('.', *names))
    try:
        return max(each.stat().st_mtime for each in (path, *below))
    except OSError:
        return time.time()


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
        code = system.number(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f'data.cache_dir: {cache}: disk full ({os.strerror(code)}); nothing half-written is left; free space or'
                ' choose another folder'
            ) from error
        if code:
            name = getattr(error, 'filename', None)
            at = f', at {os.fsdecode(name)}' if name and os.fsdecode(name) != str(cache) else ''
            raise UserError(f'data.cache_dir: {cache}: cannot write here ({os.strerror(code)}{at})') from error
        raise
