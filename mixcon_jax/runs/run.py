"""A run, as its directory tells: where its files are, what they say, and what became of it.

mixcon.json      see mark.py
config.json      the resolved configuration
tokenizer.json
metrics.jsonl    see records.py
checkpoints/     see checkpoints.py
tensorboard/     drawn from metrics.jsonl
profile/         traces, when log.profile_start asks for them

Training (``workdir.Workdir``), sweeps, ``report`` and ``watch`` read a directory by this one class, so that they say
the same of it. Reading changes nothing and takes no lock; nor does it load JAX or NumPy: answers come at once.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mixcon_jax import parsing
from mixcon_jax.errors import UserError
from mixcon_jax.options import FREE
from mixcon_jax.runs import records, saved
from mixcon_jax.runs.records import Record
from mixcon_jax.runs.scores import is_complete

CONFIG, METRICS, CHECKPOINTS = 'config.json', 'metrics.jsonl', 'checkpoints'
DONE, STOPPED, ABORTED, UNFINISHED = 'done', 'stopped', 'aborted', 'unfinished'
ENDS = (DONE, STOPPED, ABORTED)  # events of a record that ends a start of a run
BLOCK = 32 << 20  # bytes read at once
HEAD = 256  # bytes that tell a file from another in its place


class Run:
    """One run, as far as ``update`` has read its records.

    What is wanted of every record, a subclass notes in ``_take`` and drops in ``_forget``.

    Args:
      path: its directory; nothing need be there.

    Attributes:
      path: the same.
      config_file, metrics_file: paths of config.json and metrics.jsonl.
      checkpoints: path of the folder of its checkpoints.
      event: the newest record of kind ``run``, a start or an end; None before there is one.
      step: steps made, as far as they are recorded.
      last_saved: step of the newest checkpoint that the records know to be complete; None before there is one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file, self.metrics_file = path / CONFIG, path / METRICS
        self.checkpoints = path / CHECKPOINTS
        self._forget()

    def _forget(self) -> None:
        """Begins anew: the file is another one now, and the configuration may be."""
        self._offset, self._head = 0, b''
        self._identity: tuple[int, int] | None = None
        self.event: Record | None = None
        self.step = 0
        self.last_saved: int | None = None
        self._known: Any = None  # what `_outcome` follows from
        self._outcome = UNFINISHED
        self.__dict__.pop('configuration', None)

    # ----- its records -----

    def read(self) -> list[Record]:
        """All its records, at once; also the last one where only the end of its line is missing.

        Raises:
          UserError: there is a file, but it cannot be read.
        """
        return records.read(self.metrics_file)

    def update(self) -> bool:
        """Takes the records that are new since the last time; all of them where the file is another one by now.

        Returns:
          Whether there is a file.

        Raises:
          UserError: it cannot be read.
        """
        known = self.event
        try:
            with open(self.metrics_file, 'rb') as file:
                status, head = os.fstat(file.fileno()), file.read(HEAD)
                identity = (status.st_dev, status.st_ino)
                same = identity == self._identity and head.startswith(self._head) and status.st_size >= self._offset
                if self._identity and not same:
                    self._forget()
                self._identity, self._head = identity, head
                self._read(file)
        except (FileNotFoundError, NotADirectoryError):
            self._forget()
            return False
        except OSError as error:
            raise UserError(f'{self.metrics_file} cannot be read ({os.strerror(error.errno or 0)})') from error
        # A start may have another number of steps; it has written its configuration down before it says so.
        if self.event is not known:
            self.__dict__.pop('configuration', None)
        return True

    def _read(self, file: BinaryIO) -> None:
        """Takes all whole lines after the last one taken; a torn one at the end is left for the next time."""
        file.seek(self._offset)
        while block := file.read(BLOCK):
            whole = block.rfind(b'\n') + 1
            if not whole and len(block) < BLOCK:
                return
            self._take_all(block[:whole].splitlines())
            self._offset += whole or len(block)
            file.seek(self._offset)

    def _take_all(self, lines: list[bytes]) -> None:
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> Record | None:
        """The record that a line is, noted; None if it is none, as one that a kill has torn."""
        record = parsing.record(line)
        if record is None:
            return None
        self.step = max(self.step, record['step'])
        if record['kind'] == 'run':
            self.event = record
        elif record['kind'] == 'checkpoint':
            self.last_saved = record['step']
        return record

    # ----- its configuration -----

    @functools.cached_property
    def configuration(self) -> dict[str, Any] | None:
        """Its options as nested dicts, or None if none can be read.

        They are those of the newest checkpoint. What may differ from start to start, and the number of steps, which may
        grow, are as config.json has them; before there is a checkpoint, everything is.
        """
        written, kept = parsing.json_file(self.config_file), saved.newest(self.checkpoints)
        return written if kept is None else _brought_up_to_date(kept['config'], written or {})

    def option(self, key: str, default: Any = None) -> Any:
        """An option by its dotted key; ``default`` where the configuration has none."""
        value: Any = self.configuration
        for name in key.split('.'):
            value = value.get(name) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def steps(self) -> int | None:
        """Steps that it is to make, if that is known."""
        steps = self.option('train.steps')
        return steps if isinstance(steps, int) and steps > 0 else None

    # ----- what became of it -----

    @property
    def state(self) -> str:
        """``done``, ``stopped`` (saved on a signal), ``aborted`` (not finite) or ``unfinished``: to go on, or running.

        By the records as of the last ``update``, and the checkpoints that are there now.
        """
        return self.outcome(self.steps)

    def outcome(self, steps: Any) -> str:
        """Its ``state`` if it is to make ``steps`` steps; None if nothing tells.

        A run is done if it recorded so at its last step, with its scores and its parameters' fingerprint. It stays so
        when all its checkpoints are deleted, which saves room and leaves the scores; but where some are left and the
        last is damaged, it goes on from one before.
        """
        if self.event is None or self.event.get('event') not in ENDS:
            return UNFINISHED
        if self.event['event'] != DONE:
            return self.event['event']
        step = self.event['step']
        if (steps is not None and step != steps) or not is_complete(self.event):
            return UNFINISHED
        known = self.event, [_changed(folder) for folder in (self.checkpoints, self.checkpoints / str(step))]
        if known != self._known:  # whoever watches asks often, and a checkpoint has many files
            whole = not self.saved_steps() or saved.is_whole(self.checkpoints, step)
            self._known, self._outcome = known, DONE if whole else UNFINISHED
        return self._outcome

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints that are there, ascending."""
        return saved.steps(self.checkpoints)


def _brought_up_to_date(kept: Mapping[str, Any], written: Mapping[str, Any], group: str = '') -> dict[str, Any]:
    """The options of ``kept`` with those of ``written`` that may have changed since, where they are of its type."""
    result = dict(kept)
    for name, value in written.items():
        key, old = group + name, kept.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[name] = _brought_up_to_date(old, value, f'{key}.')
        elif type(value) is type(old) and (key.startswith(FREE) or key == 'train.steps'):
            result[name] = value
    return result


def _changed(folder: Path) -> int:
    """When a folder's entries changed, in nanoseconds; 0 if it is not there."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0
