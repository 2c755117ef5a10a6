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
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mixcon_jax import config as configs
from mixcon_jax import parsing
from mixcon_jax.errors import UserError
from mixcon_jax.host.folders import walk
from mixcon_jax.parsing import Record
from mixcon_jax.runs import saved
from mixcon_jax.runs.scores import is_complete

CONFIG, METRICS, CHECKPOINTS = 'config.json', 'metrics.jsonl', 'checkpoints'
NO_RUNS_INSIDE = (CHECKPOINTS, 'tensorboard', 'profile')  # of a run's folder: they may hold thousands of files
DONE, STOPPED, ABORTED, UNFINISHED = 'done', 'stopped', 'aborted', 'unfinished'
ENDS = (DONE, STOPPED, ABORTED)  # events of a record that ends a start of a run
BLOCK = 32 << 20  # bytes read at once
HEAD = 256  # bytes that tell a file from another in its place
TRAIN = b'{"kind": "train"'  # how the line of a training record begins, as records.py writes it
PARSED, NEWEST = 500, 100  # of a block: training records that ``thinned`` leaves, about; those at its end all stay


class Run:
    """One run, as far as ``update`` has read its records.

    Of training records, which are nearly all of a long file, only the last of each block is parsed, for its step. A
    subclass says in ``_take_all`` which others it needs, notes in ``_take`` what it wants of each, and drops that in
    ``_forget``.

    Args:
      path: its directory; nothing need be there.

    Attributes:
      path: the same.
      config_file, metrics_file: paths of config.json and metrics.jsonl.
      checkpoints: path of the folder of its checkpoints.
      event: the newest record of kind ``run``, a start or an end; None before there is one.
      step: steps made, as far as they are recorded.
      last_saved: step of the newest checkpoint that the records know to be complete; None before there is one.
      seconds: that its starts took, but for those that were killed, which say nothing of it.
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
        self.seconds = 0.0
        self._written = 0  # when config.json was changed last
        self._known: Any = None  # what `_outcome` follows from
        self._outcome = UNFINISHED
        self.__dict__.pop('configuration', None)

    # ----- its records -----

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
        written = _changed(self.config_file)
        if self.event is not known or written != self._written:
            self._written = written
            self.__dict__.pop('configuration', None)
        return True

    def _read(self, file: BinaryIO) -> None:
        """Takes all lines after the last one taken.

        One at the end that its end of line is missing from is taken if it is a record: nothing more can come of it, as
        of a whole JSON object. Else it is torn, or half written, and left for the next time. ``records.read`` does the
        same.
        """
        file.seek(self._offset)
        while block := file.read(BLOCK):
            whole = block.rfind(b'\n') + 1
            if len(block) < BLOCK:
                if parsing.record(block[whole:]) is not None:
                    whole = len(block)
                elif not whole:
                    return
            self._take_all([line for line in block[:whole].splitlines() if line.strip()])
            self._offset += whole or len(block)
            file.seek(self._offset)

    def _take_all(self, lines: list[bytes]) -> None:
        """Takes the lines of a block, or those of them that count."""
        training = [line for line in lines if line.startswith(TRAIN)]
        while training and self._take(training.pop()) is None:  # steps only grow within a file
            pass
        for line in lines:
            if not line.startswith(TRAIN):
                self._take(line)

    def _take(self, line: bytes) -> Record | None:
        """The record that a line is, noted; None if it is none, as one that a kill has torn."""
        record = parsing.record(line)
        if record is None:
            return None
        self.step = max(self.step, record['step'])
        if record['kind'] == 'run':
            self.event = record
            took = parsing.number(record.get('seconds'))
            self.seconds += took if took > 0 else 0
        elif record['kind'] == 'checkpoint':
            self.last_saved = record['step']
        return record

    # ----- its configuration -----

    @functools.cached_property
    def configuration(self) -> dict[str, Any] | None:
        """Its options as nested dicts, or None if none can be read.

        They are those of the newest checkpoint. What may differ from start to start, and the number of steps, which may
        grow, are as config.json has them; before there is a checkpoint, everything is. ``update`` reads them anew when
        config.json has changed, or a start or an end has come.

        Raises:
          UserError: the newest checkpoint, or the folder, cannot be read.
        """
        written, kept = parsing.json_file(self.config_file), saved.newest(self.checkpoints)
        if kept is None:
            return written
        config = kept['config']
        return _brought_up_to_date(config, written or {}, configs.free(config) | {'train.steps'})

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

        By the records as of the last ``update``, and the checkpoints that are there now; errors as of
        ``configuration``.
        """
        return self.outcome(self.steps)

    def outcome(self, steps: Any) -> str:
        """Its ``state`` if it is to make ``steps`` steps; None if nothing tells.

        A run is done if it recorded so at its last step, with its scores and its parameters' fingerprint. It stays so
        when all its checkpoints are deleted, which saves room and leaves the scores; but where some are left and the
        last is damaged, it goes on from one before. Whoever asks again is told of a checkpoint or an item of it that
        has gone since, but of damage within an item only once a record has come.

        Raises:
          UserError: the newest checkpoint, or the folder, cannot be read.
        """
        if self.event is None or self.event.get('event') not in ENDS:
            return UNFINISHED
        if self.event['event'] != DONE:
            return self.event['event']
        step = self.event['step']
        if (steps is not None and step != steps) or not is_complete(self.event):
            return UNFINISHED
        last = self.checkpoints / str(step)
        known = (
            self.event,
            [_changed(path) for path in (self.checkpoints, last, *(last / item for item in saved.ITEMS))],
        )
        if known != self._known:  # whoever watches asks often, and a checkpoint has many files
            whole = not self.saved_steps() or saved.is_whole(self.checkpoints, step)
            self._known, self._outcome = known, DONE if whole else UNFINISHED
        return self._outcome

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints that are there, ascending; errors as of ``configuration``."""
        return saved.steps(self.checkpoints)


def is_run_folder(folders: Collection[str], files: Collection[str]) -> bool:
    """Whether a folder with these folders and files in it is a run's, or was to be: for all who look for runs.

    It holds records, or a configuration and checkpoints: where either is lost, whoever looks must hear of it.
    """
    return METRICS in files or (CONFIG in files and CHECKPOINTS in folders)


def run_folders(tops: Iterable[str | Path]) -> Iterator[Path]:
    """The folders of all runs at or below ``tops``, in the order of their names; hidden ones are passed over."""
    for path, inner, files in walk(tops):
        if is_run_folder(inner, files):
            yield path
            inner[:] = [name for name in inner if name not in NO_RUNS_INSIDE]


def thinned(lines: list[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The lines of a block to parse, each with whether the line before it is among them.

    Of very many, most training records are left out: a long run's file has hundreds of megabytes, and neither a
    terminal nor a median needs that many.
    """
    stride, adjacent = max(1, len(lines) // PARSED), True
    for index, line in enumerate(lines):
        if index % stride and index < len(lines) - NEWEST and line.startswith(TRAIN):
            adjacent = False
        else:
            yield line, adjacent
            adjacent = True


def _brought_up_to_date(
    kept: Mapping[str, Any], written: Mapping[str, Any], free: Collection[str], group: str = ''
) -> dict[str, Any]:
    """The options of ``kept`` with those of ``written`` that are free to change, where they are of its type."""
    result = dict(kept)
    for name, value in written.items():
        key, old = group + name, kept.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[name] = _brought_up_to_date(old, value, free, f'{key}.')
        elif type(value) is type(old) and key in free:
            result[name] = value
    return result


def _changed(path: Path) -> int:
    """When a file, or the entries of a folder, changed, in nanoseconds; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
