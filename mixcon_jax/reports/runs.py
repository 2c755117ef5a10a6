"""Run directories as a report reads them: finished or not, and never changed."""

import errno
import functools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mixcon_jax import config as configs
from mixcon_jax import parsing
from mixcon_jax.errors import UserError
from mixcon_jax.options import THROUGH_TOKENS
from mixcon_jax.runs import mark, records, saved
from mixcon_jax.runs.mark import path_of
from mixcon_jax.runs.records import Record
from mixcon_jax.runs.run import DONE, Run, run_folders


class ReportedRun(Run):
    """One run as a report reads it: whole, once.

    Attributes:
      config: the resolved configuration.
      records: the whole records of metrics.jsonl.
      damaged: how many lines there are no records; a torn last line, which a kill may leave, is none.

    Raises:
      UserError: the configuration, the newest checkpoint or every line of metrics.jsonl is unreadable.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        there = self.update()
        self.config = self._resolved()
        if made := mark.made_of(path):
            raise UserError(f'{path} was made of {made} and not trained since')
        if not there:
            raise UserError(f'{self.metrics_file} cannot be read ({os.strerror(errno.ENOENT)})')
        if self.damaged and not self.records:
            raise UserError(f'{self.metrics_file} holds no readable record')
        _ = self.state, self.tokens  # here, where what cannot be read leaves out this run alone

    def _forget(self) -> None:
        super()._forget()
        self.records: list[Record] = []
        self.damaged = 0

    def _take_all(self, lines: list[bytes]) -> None:
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> Record | None:
        record = super()._take(line)
        if record is not None:
            self.records.append(record)
        elif line.strip():
            self.damaged += 1
        return record

    def _resolved(self) -> ml_collections.ConfigDict:
        known, path = self.configuration, self.config_file
        try:
            return configs.validate(configs.from_dict(known) if known is not None else configs.read(path))
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f'{path}: {error}') from error
        except (TypeError, ValueError, AttributeError, KeyError) as error:  # JSON, but no configuration
            words = ' '.join(str(error).split())
            raise UserError(f'{path} is not a configuration ({type(error).__name__}: {words})') from error

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """Hashes of the tokens that it was trained on, as its newest checkpoint has them; none without one."""
        kept = saved.newest(self.checkpoints)
        return tuple(kept['data']) if kept else ()

    @property
    def seed(self) -> int:
        return self.config.seed

    @functools.cached_property
    def state(self) -> str:
        """As in ``Run``, but the same all through a report."""
        return super().state

    @functools.cached_property
    def final(self) -> Record | None:
        """The scores over all held-out rows, of a run that is done."""
        if self.state != DONE:
            return None
        at_end = [record for record in self.records if record['step'] == self.config.train.steps]
        return records.last(at_end, kind='final') or records.last(at_end, kind='run')

    @functools.cached_property
    def evals(self) -> tuple[Record, ...]:
        """The scores during the run, which may be over fewer rows than the final ones."""
        return tuple(r for r in self.records if r['kind'] == 'eval' and math.isfinite(number(r, 'loss')))

    @property
    def train(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record['kind'] == 'train')

    @property
    def tokens_seen(self) -> float:
        """Real (unpadded) training tokens so far; 0 before the first record of a step."""
        return self.tokens_at(self.step)

    def tokens_at(self, step: float) -> float:
        """Training tokens after ``step`` steps: between two records by interpolation, after the last at its rate."""
        steps, tokens = self._tokens
        if step > steps[-1] > 0:
            return float(tokens[-1] * step / steps[-1])
        return float(np.interp(step, steps, tokens))

    @functools.cached_property
    def _tokens(self) -> tuple[list[float], list[float]]:
        """Steps, and the tokens seen after each, from (0, 0) on."""
        seen = {float(r['step']): number(r, 'tokens_seen') for r in self.records if r['kind'] in ('train', 'run')}
        known = sorted((step, tokens) for step, tokens in seen.items() if step > 0 and math.isfinite(tokens))
        return [0.0, *(step for step, _ in known)], [0.0, *(tokens for _, tokens in known)]

    @property
    def rates(self) -> list[float]:
        """Training tokens per second of every record that has them."""
        rates = [number(record, 'tokens_per_second') for record in self.train]
        return [rate for rate in rates if math.isfinite(rate)]

    @property
    def started(self) -> float:
        """Seconds since 1970; infinite when nothing is recorded."""
        return min((t for r in self.records if math.isfinite(t := number(r, 'time'))), default=math.inf)

    @property
    def last_time(self) -> float:
        """When the newest record was written, in seconds since 1970; -inf when there is none."""
        return max((t for r in self.records if math.isfinite(t := number(r, 'time'))), default=-math.inf)

    @property
    def devices(self) -> int | None:
        """Devices of its newest start."""
        found = [record['devices'] for record in self.records if isinstance(record.get('devices'), int)]
        return found[-1] if found else None

    @property
    def text(self) -> tuple[Any, ...]:
        """What tells held-out texts apart: scores of two runs compare only where it is equal."""
        final, data = self.final or {}, self.config.data
        if final.get('bytes'):
            return *data.sources, final['bytes']
        task = data.synthetic
        return *data.sources, task.symbols, task.num_items, task.eval_lengths or data.seq_len, final.get('tokens')


def number(record: Record | None, key: str) -> float:
    """A field as a number; NaN where it is missing, null or something else."""
    return parsing.number((record or {}).get(key))


def find(folders: Sequence[str | Path]) -> tuple[list[ReportedRun], list[str]]:
    """Reads every run directory at or below ``folders``, each once.

    Returns:
      The runs, and a note about each one that is damaged, or was not trained: without configuration or records it is
      left out.

    Raises:
      UserError: a folder does not exist, or there is no readable run.
    """
    runs, notes = [], []
    for folder in _run_folders(folders):
        try:
            run = ReportedRun(folder)
        except UserError as error:
            notes.append(f'left out: {error}')
            continue
        runs.append(run)
        if run.damaged:
            notes.append(f'{run.metrics_file}: {run.damaged} unreadable lines passed over')
    if not runs:
        where = ', '.join(map(str, folders))
        detail = f' ({len(notes)} left out, of which the first: {notes[0].removeprefix("left out: ")})' if notes else ''
        raise UserError(f'no run found in {where}{detail}; give a workdir of `mixcon train`, or a folder above some')
    _call_text_alike(runs)
    return runs, notes


def _call_text_alike(runs: Sequence[ReportedRun]) -> None:
    """Gives runs of the same tokens the same words for their data: text that has been moved is the same text."""
    first: dict[tuple[str, ...], ReportedRun] = {}
    for run in runs:
        if run.tokens:
            like = first.setdefault(run.tokens, run)
            for key in THROUGH_TOKENS:
                configs.put(run.config, key, configs.get(like.config, key))


def _run_folders(folders: Sequence[str | Path]) -> Iterator[Path]:
    """``run_folders``, of folders that are there."""
    for top in folders:
        if not path_of(top, 'FOLDER').is_dir():
            raise UserError(f'{top} is not a folder; give a workdir of `mixcon train`, or a folder above some')
    return run_folders(path_of(top) for top in folders)
