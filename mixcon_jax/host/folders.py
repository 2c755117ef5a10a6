"""Folders below others, as whoever looks for runs walks through them. Loads neither JAX nor NumPy."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def walk(tops: Iterable[str | Path]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder at or below ``tops`` with the names of its folders and files, in the order of their names.

    Each comes once, whatever links lead to it, also such as lead to a folder above. Hidden folders below are passed
    over, as are those whose names the caller takes from the list of folders.
    """
    seen = set()
    for top in tops:
        for path, inner, files in os.walk(top, followlinks=True):
            real = os.path.realpath(path)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            inner[:] = sorted(name for name in inner if not name.startswith('.'))
            yield Path(path), inner, files
