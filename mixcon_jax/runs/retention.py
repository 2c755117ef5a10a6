"""Which checkpoints stay, and how the others go: renamed first, so that nothing half gone looks like a checkpoint."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mixcon_jax.runs import saved
from mixcon_jax.runs.saved import UNFINISHED


def best_steps(steps: Sequence[int], losses: Mapping[int, float | None]) -> list[int]:
    """The steps whose loss is known and finite, from the lowest loss up; the newer first among equals."""
    known = {step: losses.get(step) for step in steps}
    known = {step: loss for step, loss in known.items() if loss is not None and math.isfinite(loss)}
    return sorted(known, key=lambda step: (known[step], -step))


def prune(folder: Path, losses: Mapping[int, float | None], keep_last: int, keep_best: int) -> list[str]:
    """Deletes checkpoints that are neither among the newest nor among the best.

    Args:
      folder: ``workdir/checkpoints``.
      losses: held-out losses by step.
      keep_last: newest checkpoints to keep.
      keep_best: checkpoints to keep for their loss.

    Returns:
      A line about each one that the system would not let go. It stays a checkpoint.
    """
    steps, refused = saved.steps(folder), []
    kept = {*steps[-keep_last:], *best_steps(steps, losses)[:keep_best]}
    for step in steps:
        if step not in kept:
            scratch = folder / f'{step}{UNFINISHED}-deleted'
            try:
                os.rename(folder / str(step), scratch)
            except OSError as error:
                refused.append(f'checkpoint {step} in {folder} cannot be deleted ({error.strerror}); it stays')
            else:
                _remove(scratch)
    return refused


def _remove(path: Path) -> None:
    """Deletes a checkpoint's folder, or the link that stands for it."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Removes saves that were cut short; writes of theirs may still be under way, so it takes a few tries."""
    for _ in range(20):
        paths = list(folder.glob(f'*{UNFINISHED}*'))
        for path in paths:
            _remove(path)
        if not any(path.exists() for path in paths):
            break
        time.sleep(0.1)


def set_aside(path: Path) -> None:
    """Renames a folder to a name that Orbax takes for no checkpoint."""
    number, target = 1, path.with_name(f'{path.name}.damaged')
    while target.exists():
        number += 1
        target = path.with_name(f'{path.name}.damaged-{number}')
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, target)
