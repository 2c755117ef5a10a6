"""Where a run's records go beside ``metrics.jsonl``: TensorBoard and Weights & Biases, which show scalars."""

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mixcon_jax.parsing import number
from mixcon_jax.runs import mark
from mixcon_jax.runs.records import Record
from mixcon_jax.runs.workdir import explained

EVENTS = 'mixcon'  # how the names of our TensorBoard files begin; others that lie beside them are left alone
FLUSH_SECONDS = 10  # how long a TensorBoard event may wait


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
