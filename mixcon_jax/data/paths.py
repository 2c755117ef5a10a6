"""Paths of files from a pattern: as a shell expands it, but each file once, however many names it has."""

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator

from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand


class NothingThereError(UserError):
    """No file matches."""


def match(pattern: str) -> list[str]:
    """Paths of the files that match a glob, sorted; ``~`` and ``**`` mean what they do in a shell.

    A file that is found under several names (a link, a link to a folder above) is taken once, under the shortest. What
    exists as it is spelled is meant literally, ``[`` and ``]`` included.

    Raises:
      NothingThereError: Nothing matches.
      UserError: A folder cannot be read.
    """
    expanded = expand(pattern, 'data.sources')
    try:
        top = '/' if expanded.startswith('/') else ''
        found = sorted(once([path for path in _expand(top, expanded.lstrip('/').split('/')) if os.path.isfile(path)]))
    except OSError as error:
        raise UserError(f"data.sources: '{pattern}': {error.filename}: {error.strerror}") from error
    if found:
        return found
    if os.path.isdir(expanded):
        raise UserError(f"data.sources: '{pattern}' is a folder; name its files: files:{pattern.rstrip('/')}/**/*.txt")
    several = '; of several sources each begins with its kind, files:' if ',' in pattern else ''
    looked = os.path.abspath(os.path.dirname(expanded) or '.')
    raise NothingThereError(f"data.sources: no file matches '{pattern}' (looked in {looked}){several}")


def once(paths: Iterable[str]) -> list[str]:
    """Each file once, by device and inode, under its shortest name; in the order that they are given in."""
    found: dict[tuple[int, int, str], str] = {}
    for path in paths:
        status = os.stat(path)
        # Some file systems number nothing.
        identity = (status.st_dev, status.st_ino, '' if status.st_ino else path)
        known = found.get(identity, path)
        found[identity] = min(known, path, key=lambda name: (name.count('/'), name))
    return list(found.values())


def _expand(base: str, parts: list[str]) -> Iterator[str]:
    """Paths below ``base`` that match the parts of a pattern."""
    if not parts:
        yield base
        return
    part, rest = parts[0], parts[1:]
    if part == '**':
        for folder in _folders(base):
            yield from _expand(folder, rest or ['*'])
    elif glob.has_magic(part) and not (set('*?').isdisjoint(part) and os.path.lexists(_join(base, part))):
        for name in _names(base):
            if fnmatch.fnmatchcase(name, part) and name.startswith('.') <= part.startswith('.'):
                yield from _expand(_join(base, name), rest)
    elif os.path.lexists(_join(base, part)):
        yield from _expand(_join(base, part), rest)


def _join(base: str, part: str) -> str:
    return f'{base}{part}' if not base or base.endswith('/') else f'{base}/{part}'


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else []


def _folders(top: str) -> Iterator[str]:
    """A folder and all below it but hidden ones, each once: a link may lead to one above."""
    waiting, seen = [top], set()
    while waiting:
        folder = waiting.pop()
        if not os.path.isdir(folder or '.'):
            continue
        status = os.stat(folder or '.')
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        waiting += [_join(folder, name) for name in reversed(_names(folder)) if not name.startswith('.')]
