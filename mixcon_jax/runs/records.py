"""``metrics.jsonl``: one JSON object a line, appended as a whole, readable after any kill.

Every record has ``kind``, ``step`` (steps made so far) and ``time`` (seconds since 1970). The kinds: ``train`` (metrics
of a step), ``eval`` (held-out scores during the run), ``final`` (those of the end, over all rows), ``checkpoint`` (one
is complete) and ``run`` (with ``event``: started, resumed, stopped, aborted, done). Numbers that are not finite are
written as null, so that every JSON reader takes the file. Loads neither JAX nor NumPy.
"""

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixcon_jax.errors import UserError
from mixcon_jax.host.files import write_whole
from mixcon_jax.parsing import Record, record


def read(path: str | Path) -> list[Record]:
    """All records of a file, none if there is no file; other lines, such as a kill may leave, are passed over.

    A last line that is a record is one although its end of line is missing.

    Raises:
      UserError: there is a file, but it cannot be read.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f'{path} cannot be read ({os.strerror(error.errno or 0)})') from error
    return [found for line in lines if (found := record(line)) is not None]


def last(records: list[Record], **wanted: Any) -> Record | None:
    """The newest record whose fields have the wanted values."""
    return next((r for r in reversed(records) if all(r.get(key) == value for key, value in wanted.items())), None)


def keep_until(path: str | Path, step: int) -> list[Record]:
    """Drops what lies after ``step``, and lines that are no records, from the file; returns what stays.

    The file is replaced as a whole: a kill leaves either the old one or the new one.
    """
    path, kept = Path(path), [found for found in read(path) if found['step'] <= step]
    if path.exists():
        write_whole(path, ''.join(_line(found) for found in kept).encode())
    return kept


class RecordLog:
    """Appends records to a file."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, 'ab', buffering=0)  # noqa: SIM115 (open as long as the run)

    def append(self, kind: str, step: int, values: Mapping[str, Any]) -> Record:
        """Writes one record with one system call; returns it as it would be read.

        Raises:
          OSError: the disk is full, or the like.
        """
        written = {'kind': kind, 'step': step, 'time': round(time.time(), 3)} | plain(values)
        line = _line(written).encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    def sync(self) -> None:
        """Returns once all records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def plain(value: Any) -> Any:
    """What JSON can hold of a value: scalars of arrays as numbers, arrays as lists, NaN and infinity as None.

    A float32 is written in the fewest digits that tell it from its neighbours: equal text is equal bits. Elements of
    larger arrays, which are statistics, keep six digits.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, 'dtype'):
        array = value.__array__()  # NumPy's, which whoever only reads records need not load
        if array.ndim:
            return _rounded(array.astype('float64').tolist() if array.dtype.kind not in 'biu' else array.tolist())
        value = array.item() if array.dtype.kind in 'biu' else float(str(array.astype('float32')))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _rounded(value: Any) -> Any:
    """Of nested lists of numbers."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return plain(float(f'{value:.6g}')) if isinstance(value, float) else value


def _line(values: Record) -> str:
    return json.dumps(values, separators=(', ', ': ')) + '\n'
