"""A run made of another: the same steps made, other weights or layers, and an optimizer that is new."""

import contextlib
import dataclasses
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_collections
from flax import nnx

from mixcon_jax import optim
from mixcon_jax.errors import UserError
from mixcon_jax.host import locks
from mixcon_jax.models import decoder
from mixcon_jax.models.layers import Buffer
from mixcon_jax.runs.checkpoints import Checkpoints, Meta, Say
from mixcon_jax.runs.mark import path_of
from mixcon_jax.runs.workdir import Workdir, explained
from mixcon_jax.step import TrainState
from mixcon_jax.trees import Tree, logical_axes, rates, to_state, undecayed

LOCK = 'lock'  # of a folder that is being written; who dies lets go of it


def new_folder(out: str | Path) -> Path:
    """The folder that ``--out`` names, in which nothing may be.

    Raises:
      UserError: something is there.
    """
    path = Workdir(path_of(out, '--out')).path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'--out {path} is there already; name a new folder')
    return path


def write(
    path: Path,
    config: ml_collections.ConfigDict,
    trees: Mapping[str, Tree],
    meta: Meta,
    source: str | Path,
    say: Say = print,
) -> None:
    """Writes a run with one checkpoint: all of it, or nothing, so that whatever fails can be tried again.

    Args:
      path: of ``new_folder``.
      config: the run's, resolved.
      trees: ``{'params': nested dicts, 'buffers': nested dicts}``.
      meta: the checkpoint's, but for its configuration, which is ``config``.
      source: the run that it was made of.
      say: takes a line about each thing that goes wrong without ending it.

    Raises:
      UserError: the disk is full, or the like.
    """
    with making(path) as folder:
        scratch = Workdir(folder)
        checkpoints = Checkpoints(scratch.checkpoints, say=say)
        try:
            checkpoints.save(fresh(config, trees, meta.step), dataclasses.replace(meta, config=config.to_dict()))
            checkpoints.wait()
        finally:
            checkpoints.close()
        scratch.commit(config, meta.tokenizer, {'source': str(source), 'step': meta.step})


@contextlib.contextmanager
def making(path: Path) -> Iterator[Path]:
    """Gives the path of a folder to make, which takes the place of ``path``, of ``new_folder``, once all is written.

    Raises:
      UserError: the disk is full, or the like.
    """
    path = path.resolve()  # what is renamed replaces no link
    with contextlib.ExitStack() as stack:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear(path)
            folder = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            locks.take(stack.enter_context(open(folder / LOCK, 'wb')))
        yield folder / path.name
        with explained(path):
            os.rename(folder / path.name, path)


def _clear(path: Path) -> None:
    """Removes what processes that were killed while they wrote ``path`` have left beside it."""
    for folder in path.parent.glob(f'.{glob.escape(path.name)}.*'):
        with contextlib.suppress(OSError), open(folder / LOCK, 'rb+') as lock:
            if locks.take(lock):
                shutil.rmtree(folder, ignore_errors=True)


def fresh(config: ml_collections.ConfigDict, trees: Mapping[str, Tree], step: int) -> TrainState:
    """The state of a run that has made so many steps, but for its optimizer, which is new."""
    _, params, _ = split(config.model)
    optimizer = optim.make_optimizer(config.optim, logical_axes(params), undecayed(params), rates(params))
    state, zero = optimizer.init(trees['params']), jnp.zeros((), jnp.int32)
    return TrainState(jnp.int32(step), trees['params'], trees['buffers'], state, zero, zero)


def built(model: ml_collections.ConfigDict, trees: Mapping[str, Tree]) -> decoder.Decoder:
    """The decoder of ``config.model`` with ``params`` and ``buffers``."""
    graphdef, *templates = split(model)
    return nnx.merge(graphdef, *(to_state(trees[name], each) for name, each in zip(('params', 'buffers'), templates)))


def split(model: ml_collections.ConfigDict) -> tuple:
    """Structure, parameters and buffers of the decoder of ``config.model``, abstract."""
    return nnx.split(decoder.abstract(model), nnx.Param, Buffer)
