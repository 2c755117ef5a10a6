"""What a run tells about itself: a progress line, ``metrics.jsonl``, TensorBoard and, if wanted, Weights & Biases.

``metrics.jsonl`` is the truth. TensorBoard's events are written anew from it whenever a run starts again, so both
always hold the same steps, each once.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import ml_collections

from mixcon_jax.errors import UserError
from mixcon_jax.host import stuck
from mixcon_jax.host.output import LiveLine
from mixcon_jax.runs import mark
from mixcon_jax.runs.goodput import Clock
from mixcon_jax.runs.records import Record, RecordLog, keep_until, plain, read
from mixcon_jax.runs.run import METRICS
from mixcon_jax.runs.workdir import explained
from mixcon_jax.runs.writers import TensorBoard, WeightsAndBiases
from mixcon_jax.units import duration, short

EVERY_STEP = ('loss', 'tokens', 'bad', 'bad_steps', 'broken')  # read after every step; the rest when it is logged
LINES = 20  # progress lines of a whole run, at least, when the output is not a terminal; and one a minute


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
        self._steps, self._line, self._active = steps, LiveLine(stream), active
        self._every = round_down(steps / LINES)
        self._first: tuple[int, int, float] | None = None  # step, tokens and seconds after the first step
        self._shown = 0.0

    def update(self, step: int, loss: float, tokens: int, seconds: float, mfu: float | None = None) -> None:
        """Shows a finished step; ``tokens`` and ``seconds`` are this process's so far, training alone."""
        if not self._active:
            return
        if self._first is None:
            self._first = (step, tokens, seconds)
        waited = time.monotonic() - self._shown
        due = waited >= 0.2 if self._line.on_terminal else step % self._every == 0 or waited >= 60
        if not due and step != self._steps:
            return
        self._shown = time.monotonic()
        line = f'step {step}/{self._steps} · loss {loss:.4f}'
        steps, tokens, elapsed = step - self._first[0], tokens - self._first[1], seconds - self._first[2]
        if steps > 0 and elapsed > 0:
            line += f' · {short(tokens / elapsed)} tokens/s'
            line += f' · MFU {100 * mfu:.1f} %' if mfu is not None else ''
            line += f' · {duration((self._steps - step) * elapsed / steps)} left'
        if self._line.on_terminal:
            self._line.live(line)
        else:
            self._line.say(line)

    def say(self, text: str) -> None:
        if self._active:
            self._line.say(text)

    def end(self) -> None:
        if self._active:
            self._line.end()


def round_down(number: float) -> int:
    """The largest of 1, 2, 5, 10, 20, 50 ... that is not above it; at least 1."""
    power = 10 ** max(0, math.floor(math.log10(max(number, 1))))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= max(number, 1))


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in plain(values).items()}
