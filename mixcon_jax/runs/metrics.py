"""What a run tells about itself: a progress line, ``metrics.jsonl``, TensorBoard and, if wanted, Weights & Biases.

``metrics.jsonl`` is the truth. TensorBoard's events are written anew from it whenever a run starts again, so both
always hold the same steps, each once.
"""

import contextlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np

from mixcon_jax.errors import UserError
from mixcon_jax.host import stuck
from mixcon_jax.host.output import lasting
from mixcon_jax.parsing import number
from mixcon_jax.runs import mark
from mixcon_jax.runs.goodput import Clock
from mixcon_jax.runs.records import Record, RecordLog, keep_until, plain, read
from mixcon_jax.runs.run import METRICS
from mixcon_jax.runs.workdir import explained
from mixcon_jax.units import duration, short

EVERY_STEP = ('loss', 'tokens', 'bad', 'bad_steps', 'broken')  # read after every step; the rest when it is logged
LINES = 20  # progress lines of a whole run, at least, when the output is not a terminal; and one a minute
EVENTS = 'mixcon'  # how the names of our TensorBoard files begin; others that lie beside them are left alone
FLUSH_SECONDS = 10  # how long a TensorBoard event may wait


@runtime_checkable
class Stream(Protocol):
    """What progress is written to."""

    def write(self, text: str, /) -> Any: ...
    def flush(self) -> Any: ...
    def isatty(self) -> bool: ...


class Metrics:
    """Takes a run's metrics and spreads them.

    Args:
      folder: the workdir.
      config: the whole configuration.
      clock: where the run's time goes.
      flops_per_token: of training, forward and backward.
      peak_flops: of all devices together; None leaves MFU out.
      active: False in processes other than the first, which then write nothing.
      stream: where progress is shown.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ml_collections.ConfigDict,
        clock: Clock,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        active: bool = True,
        stream: Stream | None = None,
    ) -> None:
        self._folder, self._config, self._clock, self._active = Path(folder), config, clock, active
        self._path, self._events = self._folder / METRICS, self._folder / 'tensorboard'
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._progress = Progress(config.train.steps, stream or sys.stdout, active)
        self._log: RecordLog | None = None
        self._writers: list[Any] = []
        self._window: tuple[int, float] | None = None  # tokens and training seconds at the last record
        self._tokens = self.tokens_seen = 0
        self._rate = math.nan
        if active and config.log.tensorboard:
            mark.require_place(self._events)
        if active and config.log.wandb and importlib.util.find_spec('wandb') is None:
            raise UserError(
                "log.wandb is on but wandb is not installed: pip install 'mixcon-jax[wandb]', or turn it off"
            )

    def start(self, step: int, tokens_seen: int = 0) -> list[Record]:
        """Opens the files for a run that goes on after ``step``; returns the records up to there.

        Args:
          step: the restored step, 0 for a new run; what was written after it is dropped.
          tokens_seen: tokens trained on before it.
        """
        self.tokens_seen = tokens_seen
        if not self._active:  # what follows from the records must be the same in every process
            return [record for record in read(self._path) if record['step'] <= step]
        kept = keep_until(self._path, step)
        self._log = RecordLog(self._path)
        if self._config.log.tensorboard:
            self._writers.append(TensorBoard(self._events, kept))
        if self._config.log.wandb:
            self._writers.append(WeightsAndBiases(self._folder, self._config))
        return kept

    def train(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Waits for the metrics of a dispatched step, counts and shows them, and records those that are due.

        Returns:
          The step's ``loss``, ``tokens``, ``bad``, ``bad_steps`` and ``broken`` on the host.
        """
        now = jax.device_get({key: metrics[key] for key in EVERY_STEP if key in metrics})
        self._tokens += int(now['tokens'])
        self.tokens_seen += int(now['tokens'])
        if step % self._config.log.every == 0 or step in (1, self._config.train.steps):
            self._measure()
            if self._active:  # other processes need not fetch
                values = jax.device_get(dict(metrics))
                stats = values.pop('stats', {})
                values.pop('broken', None)  # it ends the run, which says so
                self._record('train', step, values | self._speed() | {'stats': stats})
        if self._window is None:  # the first step of this start, whose compilation says nothing about speed
            self._window = (self._tokens, self._clock.training())
        self._progress.update(step, float(now['loss']), self._tokens, self._clock.training(), self._mfu())
        return now

    def _measure(self) -> None:
        """Takes the rate since the last record."""
        now = self._clock.training()
        if self._window is not None and now > self._window[1]:
            tokens, seconds = self._window
            self._rate = (self._tokens - tokens) / (now - seconds)
            self._window = (self._tokens, now)

    def _speed(self) -> dict[str, Any]:
        speed: dict[str, Any] = {'tokens_seen': self.tokens_seen}
        if not math.isnan(self._rate):
            speed['tokens_per_second'] = round(self._rate, 1)
        if self._flops_per_token and not math.isnan(self._rate):
            speed['flops_per_second'] = float(f'{self._rate * self._flops_per_token:.6g}')
        if (mfu := self._mfu()) is not None:
            speed['mfu'] = round(mfu, 6)
        shares = self._clock.shares()
        return speed | {'goodput': round(shares.pop('goodput'), 4), 'time_shares': _rounded(shares)}

    def _mfu(self) -> float | None:
        """Model FLOP/s as a share of the devices' peak; None when either is unknown."""
        if not self._flops_per_token or not self._peak_flops or math.isnan(self._rate):
            return None
        return self._rate * self._flops_per_token / self._peak_flops

    def record(self, kind: str, step: int, **values: Any) -> Record | None:
        """Writes a record of another kind."""
        return self._record(kind, step, values) if self._active else None

    def _record(self, kind: str, step: int, values: Mapping[str, Any]) -> Record:
        assert self._log is not None, 'start() comes before records'
        with stuck.own():
            with explained(self._path):
                record = self._log.append(kind, step, values)
            for writer in self._writers:
                writer.write(record)
        return record

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        self._progress.say(text)

    def sync(self) -> None:
        """Puts all records on the disk: before a checkpoint, which must never be ahead of them."""
        if self._log is not None:
            with stuck.own(), explained(self._path):
                self._log.sync()

    def close(self) -> None:
        self._progress.end()
        for writer in self._writers:
            writer.close()
        if self._log is not None:
            self._log.close()


class Progress:
    """One line that rewrites itself on a terminal; elsewhere a few dozen lines a run."""

    def __init__(self, steps: int, stream: Stream, active: bool = True) -> None:
        self._steps, self._stream, self._active = steps, lasting(stream), active
        self._terminal = stream.isatty()
        self._every = round_down(steps / LINES)
        self._first: tuple[int, int, float] | None = None  # step, tokens and seconds after the first step
        self._shown, self._width = 0.0, 0

    def update(self, step: int, loss: float, tokens: int, seconds: float, mfu: float | None = None) -> None:
        """Shows a finished step; ``tokens`` and ``seconds`` are this process's so far, training alone."""
        if not self._active:
            return
        if self._first is None:
            self._first = (step, tokens, seconds)
        waited = time.monotonic() - self._shown
        due = waited >= 0.2 if self._terminal else step % self._every == 0 or waited >= 60
        if not due and step != self._steps:
            return
        self._shown = time.monotonic()
        line = f'step {step}/{self._steps} · loss {loss:.4f}'
        steps, tokens, elapsed = step - self._first[0], tokens - self._first[1], seconds - self._first[2]
        if steps > 0 and elapsed > 0:
            line += f' · {short(tokens / elapsed)} tokens/s'
            line += f' · MFU {100 * mfu:.1f} %' if mfu is not None else ''
            line += f' · {duration((self._steps - step) * elapsed / steps)} left'
        self._write(f'\r{line.ljust(self._width)}' if self._terminal else f'{line}\n')
        self._width = len(line) if self._terminal else 0

    def say(self, text: str) -> None:
        if self._active:
            self._write(f'\r{text.ljust(self._width)}\n' if self._width else f'{text}\n')
            self._width = 0

    def end(self) -> None:
        if self._active and self._width:
            self._write('\n')
            self._width = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class TensorBoard:
    """Scalars as TensorBoard events, in one file that is written anew from the records at every start.

    Events are written here and now: tensorboardX's own thread, once the disk is full, leaves the program waiting.
    """

    def __init__(self, folder: Path, records: list[Record]) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # slow to import, and a run may do without
        from tensorboardX.proto import event_pb2, summary_pb2

        self._folder, self._event, self._summary = folder, event_pb2.Event, summary_pb2.Summary
        with explained(folder):
            mark.require_folder(folder)
            for path in folder.glob(f'{EVENTS}.out.tfevents.*'):
                path.unlink()
            self._writer = EventsWriter(str(folder / EVENTS))
        self._flushed = time.monotonic()
        for record in records:
            self.write(record)

    def write(self, record: Record) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars(record).items()]
        if not values:
            return
        event = self._event(wall_time=record.get('time'), step=record['step'], summary=self._summary(value=values))
        with explained(self._folder):
            self._writer.write_event(event)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flushed = time.monotonic()
                self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written stands in metrics.jsonl
            self._writer.close()


class WeightsAndBiases:
    """Scalars in a Weights & Biases run that a restarted run continues under the same id.

    What was sent cannot be taken back: after a kill, steps that are made again are sent again and replace nothing.
    """

    def __init__(self, folder: Path, config: ml_collections.ConfigDict) -> None:
        import wandb

        path = folder / 'wandb_id.txt'
        if not path.exists():
            path.write_text(os.urandom(6).hex(), encoding='utf-8')
        identity = path.read_text(encoding='utf-8').strip()
        self._run = wandb.init(
            id=identity, resume='allow', dir=str(folder), name=config.name or folder.name,
            project=os.environ.get('WANDB_PROJECT', 'mixcon'), config=config.to_dict(),
        )  # fmt: skip

    def write(self, record: Record) -> None:
        if values := scalars(record):
            self._run.log(values, step=record['step'])

    def close(self) -> None:
        self._run.finish()


def scalars(record: Record) -> dict[str, float]:
    """A record's numbers by a slashed name; of statistics the mean over blocks.

    Of vectors, such as the experts' load, the largest element bears the name, and the smallest the name with ``_min``.
    """
    if record['kind'] not in ('train', 'eval', 'final'):
        return {}
    values: dict[str, float] = {}
    for key, value in record.items():
        if key in ('kind', 'step', 'time'):
            continue
        if key in ('stats', 'time_shares'):
            for name, item in value.items():
                values |= _of_blocks(f'{key}/{name}', item)
        elif key == 'by_length' and isinstance(value, dict):
            table = {length: part.get('accuracy') for length, part in value.items() if isinstance(part, dict)}
            values |= {f'{record["kind"]}/accuracy_{length}': number(share) for length, share in table.items()}
        elif isinstance(value, bool) or not math.isnan(number(value)):
            values[f'{record["kind"]}/{key}'] = float(value)
    return values


def _of_blocks(name: str, item: Any) -> dict[str, float]:
    """What ``scalars`` gives of a statistic; nothing of what is none, as in a damaged record."""
    try:
        array = np.array(item, np.float64)
    except (TypeError, ValueError, OverflowError):
        return {}
    if array.ndim < 2 or not array.size:
        return {name: float(array.mean())} if array.size else {}
    return {name: float(array.max(axis=-1).mean()), f'{name}_min': float(array.min(axis=-1).mean())}


def round_down(number: float) -> int:
    """The largest of 1, 2, 5, 10, 20, 50 ... that is not above it; at least 1."""
    power = 10 ** max(0, math.floor(math.log10(max(number, 1))))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= max(number, 1))


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in plain(values).items()}
