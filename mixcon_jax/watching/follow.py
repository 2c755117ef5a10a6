"""Follows runs by their files alone: finds them in a folder tree, reads what each appended, says how each is doing.

Loads neither JAX nor NumPy, writes nothing, and takes no lock: a training process never notices that it is watched.
"""

import functools
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mixcon_jax.errors import UserError
from mixcon_jax.host.folders import walk
from mixcon_jax.host.paths import expand_path
from mixcon_jax.parsing import Record, json_file, number
from mixcon_jax.runs import mark
from mixcon_jax.runs.run import ENDS, METRICS, NEWEST, Run, is_run_folder, run_folders, thinned

PATIENCE, START_PATIENCE = 60.0, 600.0  # seconds a run may be silent, at least: between records, and before the first


class Curve:
    """A series over steps in bounded memory: once there are too many points, neighbours are averaged.

    Attributes:
      points: ``[step, value]`` each, by step; the step is the last of those averaged.
    """

    def __init__(self, limit: int = 1024) -> None:
        self.points: list[list[float]] = []
        self._limit, self._width, self._in_last = limit, 1, 0

    def add(self, step: float, value: float) -> None:
        """Appends a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        if self.points and self._in_last < self._width:
            mean = self.points[-1][1]
            self.points[-1] = [step, mean + (value - mean) / (self._in_last + 1)]
        else:
            self.points.append([step, value])
            self._in_last = 0
        self._in_last += 1
        if len(self.points) == self._limit and self._in_last == self._width:
            pairs = zip(self.points[::2], self.points[1::2])
            self.points = [[later[0], (earlier[1] + later[1]) / 2] for earlier, later in pairs]
            self._width *= 2
            self._in_last = self._width


class WatchedRun(Run):
    """One run with what is shown of it as it goes on, in bounded memory.

    Attributes:
      train, scores: the newest record of kind ``train``, and of ``eval`` or ``final``.
      seen: time of the newest record, in seconds since 1970.
      curves: ``loss``, ``grad_norm``, ``learning_rate``, ``heldout`` over steps.
      unreadable: why it cannot be read, as of the last look; empty if it can.
      made_of: what it was made of, if by other means than training; empty of any other.
    """

    unreadable = made_of = ''

    def _forget(self) -> None:
        super()._forget()
        self.train: Record | None = None
        self.scores: Record | None = None
        self.seen = 0.0
        self.curves = {name: Curve() for name in ('loss', 'grad_norm', 'learning_rate', 'heldout')}
        self._recent: deque[tuple[float, int]] = deque(maxlen=NEWEST)  # time and step of this start's train records
        self._longest = 0.0  # seconds between two neighbouring records

    def update(self) -> bool:
        """Reads what is new; returns whether the run is still there. One that cannot be read stays, and says why."""
        if self.unreadable:
            self.__dict__.pop('configuration', None)
        self.unreadable = ''
        try:
            there = super().update()
            self.state  # noqa: B018 (reads the configuration and, of a run that has ended, its checkpoints)
            self.made_of = '' if there else mark.made_of(self.path)
        except UserError as error:
            self.unreadable = str(error)
            return True
        if there or self.made_of:
            return True
        self.unreadable = f'{METRICS} is not there'
        return any(is_run_folder(inner, files) for _, inner, files in islice(walk([self.path]), 1))

    @functools.cached_property
    def configuration(self) -> dict[str, Any] | None:
        """As in ``Run`` or, where the checkpoints cannot be read, that of config.json."""
        try:
            return super().configuration
        except UserError as error:
            self.unreadable = str(error)
            return json_file(self.config_file)

    def _take_all(self, lines: list[bytes]) -> None:
        for line, adjacent in thinned(lines):
            self._take(line, adjacent)

    def _take(self, line: bytes, adjacent: bool = True) -> Record | None:
        """Notes one record; ``adjacent`` says whether the one before it was read too."""
        record = super()._take(line)
        if record is None:
            return None
        kind, step, now = record['kind'], record['step'], number(record.get('time'))
        if kind == 'run':
            self._recent.clear()
        elif adjacent and self._recent and now > self.seen:  # not before the first, which waits for compilation
            self._longest = max(self._longest, now - self.seen)
        if kind == 'train':
            self.train = record
            self._recent.append((now, step))
            for name in ('loss', 'grad_norm', 'learning_rate'):
                self.curves[name].add(step, number(record.get(name)))
        elif kind in ('eval', 'final'):
            self.scores = record
            self.curves['heldout'].add(step, number(record.get('loss')))
        if math.isfinite(now):
            self.seen = now
        return record

    def status(self, now: float) -> str:
        """``unreadable``, ``made``, ``starting``, ``running``, ``silent`` or, of one that has ended, its ``state``.

        A run is silent when no record came for a minute and for three times as long as it ever took; before the first
        record of a step, which waits for compilation, for ten minutes.
        """
        if not self.unreadable and self.event is not None and self.event.get('event') in ENDS:
            try:
                return self.state
            except UserError as error:  # since the last look
                self.unreadable = str(error)
        if self.unreadable:
            return 'unreadable'
        if self.made_of:
            return 'made'
        patience = max(PATIENCE, 3 * self._longest) if self._recent else START_PATIENCE
        if self.seen and now - self.seen > patience:
            return 'silent'
        return 'running' if self._recent else 'starting'

    def seconds_per_step(self) -> float | None:
        """Of the newest records of this start, evaluations and checkpoints between them included."""
        if len(self._recent) < 2:
            return None
        (began, first), (ended, last) = self._recent[0], self._recent[-1]
        return (ended - began) / (last - first) if last > first and ended > began else None

    def seconds_left(self, now: float) -> float | None:
        """Until the last step, from ``now``; None when it cannot be known or the run is not running."""
        pace = self.seconds_per_step()
        if pace is None or self.steps is None or self.status(now) != 'running':
            return None
        ended, last = self._recent[-1]
        return max(0.0, (self.steps - last) * pace - max(0.0, now - ended))


class Runs:
    """All runs below some folders, as they come and go."""

    def __init__(self, roots: Sequence[str | Path]) -> None:
        self._roots = [expand_path(root) for root in roots]
        self._runs: dict[str, WatchedRun] = {}
        self._next_search = 0.0

    def update(self) -> list[WatchedRun]:
        """Looks for new runs, reads what all have appended; returns those that are there, by folder."""
        began = time.monotonic()
        if began >= self._next_search:
            for folder in run_folders(self._roots):
                key = os.path.realpath(folder)
                if key not in self._runs:
                    self._runs[key] = WatchedRun(folder)
            ended = time.monotonic()
            self._next_search = ended + 20 * (ended - began)  # large trees and slow disks are searched less often
        for key, run in list(self._runs.items()):
            if not run.update():
                del self._runs[key]
        return [self._runs[key] for key in sorted(self._runs)]
