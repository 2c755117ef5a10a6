"""The status of a sweep's cases: how far each is, read from its folder; nothing is changed there."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from launch.sweep.cases import Case
from mixcon_jax.errors import UserError
from mixcon_jax.parsing import Record, number
from mixcon_jax.runs import mark
from mixcon_jax.runs.run import DONE, Run, thinned
from mixcon_jax.runs.workdir import Workdir

NEW, STARTED, REFUSED = 'new', 'started', 'refused'  # and DONE


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a case is.

    Attributes:
      state: ``new``; ``started``: goes on from ``step``; ``done``; ``refused``: the folder holds another run, or one
        that cannot be read.
      step: of the checkpoint from which it would go on.
      steps: that the case shall make.
      scores: the last record of a case that is done.
      error: why it is refused.
    """

    state: str
    step: int
    steps: int
    scores: Record = dataclasses.field(default_factory=dict)
    error: str = ''

    def __str__(self) -> str:
        return f'at step {self.step} of {self.steps}' if self.state == STARTED else self.state


def status_of(case: Case, workdir: Path) -> Status:
    """How far ``case`` is in the sweep's folder."""
    folder, steps = Workdir(workdir / case.folder), case.config.train.steps
    try:
        mark.require_ours(folder.path)
        record = folder.finished(case.config)
        folder.require_same(case.config)
        step, begun = max(folder.saved_steps(), default=0), folder.has_progress()
    except UserError as error:
        return Status(REFUSED, 0, steps, error=str(error))
    if record is not None:
        return Status(DONE, steps, steps, record)
    return Status(STARTED if begun else NEW, step, steps)


def tokens_per_step(config: Any) -> int:
    return config.train.batch_size * config.data.seq_len


class TimedRun(Run):
    """A run with what tells how fast it goes."""

    def _forget(self) -> None:
        super()._forget()
        self._rates: list[float] = []  # tokens a second, as training recorded them
        self._began, self._most, self._seconds = 0, 0, 0.0  # where a start began; steps and seconds of the longest

    def _take_all(self, lines: list[bytes]) -> None:
        for line, _ in thinned(lines):
            self._take(line)

    def _take(self, line: bytes) -> Record | None:
        record = super()._take(line)
        if record is None:
            return None
        if record['kind'] == 'train':
            rate = number(record.get('tokens_per_second'))
            self._rates += [rate] if rate > 0 else []
        elif record['kind'] == 'run':
            if record.get('event') in ('started', 'resumed'):
                self._began = record['step']
            elif number(record.get('seconds')) > 0 and record['step'] - self._began > self._most:
                self._most, self._seconds = record['step'] - self._began, record['seconds']
        return record

    def steps_speed(self) -> float | None:
        """Tokens a second of its steps: the median of what it recorded, or None."""
        return statistics.median(self._rates) if self._rates else None

    def whole_speed(self, case: Case) -> float | None:
        """Tokens a second of a case with all that belongs to a run, or None before it has a speed.

        That of its longest start if that made at least half of the steps, start-up, compilation and evaluations
        included; else that of its steps alone.
        """
        if self._most and 2 * self._most >= case.config.train.steps:
            return self._most * tokens_per_step(case.config) / self._seconds
        return self.steps_speed()


def measure(scores: Record) -> tuple[str, float]:
    """Name and value of what tells beside the loss: bits per byte of text, accuracy of a task."""
    name, key = ('bits per byte', 'bits_per_byte') if scores.get('bytes', 1) else ('accuracy', 'accuracy')
    return name, number(scores.get(key))
