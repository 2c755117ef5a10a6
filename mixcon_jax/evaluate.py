"""Held-out scores: loss, perplexity and bits per byte, of a running training or of any checkpoint."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixcon_jax import step as steps
from mixcon_jax.data import files
from mixcon_jax.data.loader import HeldoutBatches, heldout_from_texts
from mixcon_jax.data.prepare import prepare, require_tokenizer
from mixcon_jax.errors import UserError
from mixcon_jax.inference import load_model


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores over a set of tokens.

    Attributes:
      step: the checkpoint's step.
      loss: mean cross-entropy in nats per token.
      bits_per_byte: the sum of the cross-entropy in bits over the bytes of the original text.
      tokens: scored tokens, each document's end included.
      bytes: bytes of the original text.
    """

    step: int
    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def score(
    eval_batch: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]], batches: HeldoutBatches, step: int
) -> Scores:
    """Scores every row of ``batches``.

    Args:
      eval_batch: batch -> ``{'nll': sum of nats, 'tokens': their number}``; results are fetched one batch late, so that
        the device never waits.
      batches: held-out rows, each target once.
      step: what to call the checkpoint.
    """
    nll, tokens, pending = 0.0, 0, None
    for result in itertools.chain(map(eval_batch, batches), [None]):
        if pending is not None:
            nll, tokens = nll + float(pending['nll']), tokens + int(pending['tokens'])
        pending = result
    return Scores(
        step, nll / max(tokens, 1), nll / math.log(2) / max(batches.num_bytes, 1), tokens, round(batches.num_bytes)
    )


def evaluate(
    workdir: str | Path, paths: Sequence[str] = (), step: int | str | None = None, batch_size: int = 0
) -> Scores:
    """Scores a checkpoint on its run's held-out text, or on given text files.

    Args:
      workdir: a run directory.
      paths: files or globs; none means the held-out split.
      step: a checkpoint's step, ``'best'`` or None for the newest.
      batch_size: rows of a batch; 0 means the run's own.

    Raises:
      UserError: no such checkpoint or file, or a tokenizer that is not the store's.
    """
    trained = load_model(workdir, step)
    config = trained.config
    rows = batch_size or config.eval.batch_size
    if paths:
        found = [file for pattern in paths for file in files.match(pattern)]
        documents = [document.text for file in found for document in files.read(file, config.data.text_field)]
        batches = heldout_from_texts(documents, trained.tokenizer, config, rows)
    else:
        stores = prepare(config.data)
        require_tokenizer(stores, trained.tokenizer, f'{workdir} (checkpoint {trained.step})')
        if trained.data != tuple(store.fingerprint for store in stores):
            raise UserError(
                f'the text of data.sources is not what {workdir} was trained on: some of it may be held out no longer;'
                ' restore it, or name files to score'
            )
        batches = HeldoutBatches(config, stores, rows)
    graphdef, variables = nnx.split(trained.model)

    @jax.jit
    def eval_batch(variables: nnx.State, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        return steps.eval_step(config, nnx.merge(graphdef, variables), 1, batch)

    return score(lambda batch: eval_batch(variables, jax.tree.map(jnp.asarray, dict(batch))), batches, trained.step)
