"""The weights of a run alone: to evaluate, to sample from, or to start another run with."""

from pathlib import Path

from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand_folder
from mixcon_jax.runs import mark
from mixcon_jax.runs.checkpoints import Checkpoints, Meta, Say, Shardings
from mixcon_jax.runs.run import CHECKPOINTS
from mixcon_jax.trees import Tree


def load_params(
    workdir: str | Path,
    step: int | str | None = None,
    shardings: Shardings | None = None,
    say: Say = print,
) -> tuple[Tree, Meta]:
    """Parameters of a run, to evaluate, to sample from or to start another run with; changes nothing on disk.

    Args:
      workdir: a run directory.
      step: a step; ``'best'`` by held-out loss; None for the newest intact one.
      shardings: of leaves by name (``params/embedding``); those without lie whole on the first device. Or what
        returns them for the ``Meta`` and the shapes of the checkpoint that is taken.
      say: takes a line about each damaged checkpoint that was passed over.

    Returns:
      ``{'params': nested dicts, 'buffers': nested dicts}`` and ``Meta`` with config, tokenizer and step.

    Raises:
      UserError: the folder is no run, or holds no such intact checkpoint.
    """
    folder = expand_folder(mark.path_of(workdir)) / CHECKPOINTS
    if not folder.is_dir():
        raise UserError(f'{workdir} holds no checkpoints; give the workdir of a run')
    checkpoints = Checkpoints(folder, say=say, read_only=True)
    try:
        return checkpoints.load(step, shardings)
    finally:
        checkpoints.close()
