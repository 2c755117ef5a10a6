"""The status of a sweep's cases: how far each is, read from its folder; nothing is changed there."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.sweep.cases import Case
from mixcon_jax.errors import UserError
from mixcon_jax.parsing import Record, number
from mixcon_jax.runs import mark
from mixcon_jax.runs.run import DONE, Run
from mixcon_jax.runs.workdir import Workdir

NEW, STARTED, REFUSED = 'new', 'started', 'refused'  # and DONE


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a case is.

    Attributes:
      state: ``new``; ``started``: goes on from ``step``; ``done``; ``refused``: the folder holds another run.
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
    except UserError as error:
        return Status(REFUSED, 0, steps, error=str(error))
    if record is not None:
        return Status(DONE, steps, steps, record)
    step = max(folder.saved_steps(), default=0)
    return Status(STARTED if folder.has_progress() else NEW, step, steps)


def tokens_per_step(config: Any) -> int:
    return config.train.batch_size * config.data.seq_len


def steps_speed(records: Sequence[Record]) -> float | None:
    """Tokens a second of a run's steps: the median of what it recorded, or None."""
    rates = [number(each.get('tokens_per_second')) for each in records if each['kind'] == 'train']
    known = [rate for rate in rates if rate > 0]
    return statistics.median(known) if known else None


def whole_speed(case: Case, workdir: Path) -> float | None:
    """Tokens a second of a case with all that belongs to a run, or None before it has a speed.

    That of its longest start if that made at least half of the steps, start-up, compilation and evaluations included;
    else that of its steps alone.
    """
    records = Run(workdir / case.folder).read()
    began, most, speed = 0, 0, 0.0
    for each in records:
        if each['kind'] != 'run':
            continue
        if each.get('event') in ('started', 'resumed'):
            began = each['step']
        elif number(each.get('seconds')) > 0 and each['step'] - began > most:
            most = each['step'] - began
            speed = most * tokens_per_step(case.config) / each['seconds']
    return speed if 2 * most >= case.config.train.steps else steps_speed(records)


def measure(scores: Record) -> tuple[str, float]:
    """Name and value of what tells beside the loss: bits per byte of text, accuracy of a task."""
    name, key = ('bits per byte', 'bits_per_byte') if scores.get('bytes', 1) else ('accuracy', 'accuracy')
    return name, number(scores.get(key))
