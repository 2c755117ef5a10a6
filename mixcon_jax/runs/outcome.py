"""What became of a run, as its folder tells: one answer for training, sweeps, reports and whoever watches.

Loads neither JAX nor NumPy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixcon_jax.runs import saved

DONE, STOPPED, ABORTED, UNFINISHED = 'done', 'stopped', 'aborted', 'unfinished'
ENDS = (DONE, STOPPED, ABORTED)  # events of a record that ends a start of a run


def outcome(event: Mapping[str, Any] | None, steps: Any, checkpoints: Path) -> str:
    """``done``, ``stopped`` (saved on a signal), ``aborted`` (not finite), or ``unfinished``: it runs, or is to go on.

    A run is done if it recorded so at its last step. It stays so when all its checkpoints are deleted, which saves room
    and leaves the scores; but where some are left and the last is damaged, it goes on from one before.

    Args:
      event: its newest record of kind ``run``.
      steps: that it is to make; None if nothing tells.
      checkpoints: the folder of its checkpoints.
    """
    if event is None or event.get('event') not in ENDS:
        return UNFINISHED
    if event['event'] != DONE:
        return event['event']
    if steps is not None and event['step'] != steps:
        return UNFINISHED
    left = saved.steps(checkpoints)
    return UNFINISHED if left and not saved.is_whole(checkpoints, event['step']) else DONE
