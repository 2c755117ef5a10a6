"""Paths of files from a pattern: as a shell expands it, but each file once, however many names it has."""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator

from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand

NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # there is nothing of this name


class NothingThereError(UserError):
    """What a source names is not there, or out of reach: no file matches, the hub does not answer."""


def match(pattern: str, name: str = 'data.sources', prefix: str = 'files:') -> list[str]:
    """Paths of the files that match a glob, sorted; ``~`` and ``**`` mean what they do in a shell.

    A file that is found under several names (a link, a link to a folder above) is taken once, under the shortest. A
    part of the pattern without ``*`` and ``?`` that exists as it is spelled is meant literally, ``[`` and ``]``
    included.

    Args:
      pattern: As a user wrote it.
      name: Of the option that holds it, for errors; empty for an argument of a command.
      prefix: What stands before patterns there.

    Raises:
      NothingThereError: Nothing matches.
      UserError: A folder, or a file that matches, cannot be reached.
    """
    expanded, label = expand(pattern, name), f'{name}: ' if name else ''
    try:
        top = '/' if expanded.startswith('/') else ''
        found = sorted(once([path for path in _expand(top, expanded.lstrip('/').split('/')) if _is_file(path)]))
    except OSError as error:
        raise UserError(f"{label}'{pattern}': {error.filename}: {error.strerror}") from error
    if found:
        return found
    if stat.S_ISDIR(_mode(expanded)):
        raise UserError(f"{label}'{pattern}' is a folder; name its files: {prefix}{pattern.rstrip('/')}/**/*.txt")
    several = f'; of several sources each begins with its kind, {prefix}' if prefix and ',' in pattern else ''
    looked = os.path.abspath(os.path.dirname(expanded) or '.')
    raise NothingThereError(f"{label}no file matches '{pattern}' (looked in {looked}){several}")


def given(argument: str) -> list[str]:
    """The file that an argument of a command names, whatever its letters; if there is none, what it matches."""
    expanded = expand(argument)
    return [expanded] if os.path.isfile(expanded) else match(argument, '', '')


def once(paths: Iterable[str]) -> list[str]:
    """Each file once, by device and inode, under its shortest name; in the order that they are given in."""
    found: dict[tuple[int, int, str], str] = {}
    for path in paths:
        key = identity(path)
        found[key] = min(found.get(key, path), path, key=lambda name: (name.count('/'), name))
    return list(found.values())


def identity(path: str) -> tuple[int, int, str]:
    """What is the same for all names of a file: its device and inode, or where file systems number nothing its path."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, '' if status.st_ino else os.path.abspath(path)


def _expand(base: str, parts: list[str]) -> Iterator[str]:
    """Paths below ``base`` that match the parts of a pattern."""
    if not parts:
        yield base
        return
    part, rest = parts[0], parts[1:]
    if part == '**':
        for folder in _folders(base):
            yield from _expand(folder, rest or ['*'])
    elif glob.has_magic(part) and not (set('*?').isdisjoint(part) and _exists(_join(base, part))):
        for name in _names(base):
            if fnmatch.fnmatchcase(name, part) and name.startswith('.') <= part.startswith('.'):
                yield from _expand(_join(base, name), rest)
    elif _exists(_join(base, part)):
        yield from _expand(_join(base, part), rest)


def _join(base: str, part: str) -> str:
    return f'{base}{part}' if not base or base.endswith('/') else f'{base}/{part}'


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder or '.')) if stat.S_ISDIR(_mode(folder or '.')) else []


def _is_file(path: str) -> bool:
    """Whether a match is a file, and not a folder; a link that leads nowhere raises OSError."""
    mode = _mode(path)
    if not mode and os.path.islink(path):
        raise OSError(errno.ENOENT, 'a link that leads nowhere; mend or delete it', path)
    return stat.S_ISREG(mode)


def _mode(path: str) -> int:
    """Of what is there; 0 where there is nothing. What cannot be reached is not nothing, and raises OSError."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno not in NOTHING:
            raise
        return 0


def _exists(path: str) -> bool:
    """``os.path.lexists``, but what cannot be reached raises OSError."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno not in NOTHING:
            raise
        return False
    return True


def _folders(top: str) -> Iterator[str]:
    """A folder and all below it but hidden ones, each once: a link may lead to one above."""
    waiting, seen = [top], set()
    while waiting:
        folder = waiting.pop()
        if not stat.S_ISDIR(_mode(folder or '.')):
            continue
        status = os.stat(folder or '.')
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        waiting += [_join(folder, name) for name in reversed(_names(folder)) if not name.startswith('.')]
