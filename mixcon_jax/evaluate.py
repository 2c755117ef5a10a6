"""Held-out scores: loss, perplexity and bits per byte, of a running training or of any checkpoint."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax import step as steps
from mixcon_jax.checks import divides
from mixcon_jax.data import files
from mixcon_jax.data.dataset import open_dataset
from mixcon_jax.data.documents import Document
from mixcon_jax.data.loader import heldout_from_texts
from mixcon_jax.data.packing import WHOLE, Share
from mixcon_jax.data.synthetic import is_synthetic
from mixcon_jax.errors import UserError
from mixcon_jax.host import processes, stuck
from mixcon_jax.inference.load import TrainedModel, load_model
from mixcon_jax.parallel import axes
from mixcon_jax.parallel.layout import own_rows, place_rows, replicated
from mixcon_jax.runs.scores import SCORES


@dataclasses.dataclass(frozen=True)
class Part:
    """Scores over the rows of one length: mean cross-entropy in nats, accuracy, and the number of scored tokens."""

    loss: float
    accuracy: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores over a set of tokens.

    Attributes:
      step: the checkpoint's step.
      loss: mean cross-entropy in nats per token.
      accuracy: share of the tokens to which no other was preferred.
      bits_per_byte: the sum of the cross-entropy in bits over the bytes of the original text; None without text, and
        where the tokens do not give back every byte of it.
      tokens: scored tokens, each document's end included.
      bytes: bytes of the original text.
      by_length: the same by the rows' number of tokens T.
      round_trip: the share of the bytes that decoding the tokens gives back; None if it was never measured.
    """

    step: int
    loss: float
    accuracy: float
    bits_per_byte: float | None
    tokens: int
    bytes: int
    by_length: Mapping[int, Part]
    round_trip: float | None = 1.0

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that overflows."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)

    def as_record(self) -> dict[str, Any]:
        """The scores as a record holds them: of a task with its lengths, and by length where there are several."""
        by_length = {str(length): dataclasses.asdict(part) for length, part in self.by_length.items()}
        lengths = {} if self.bytes else {'lengths': sorted(self.by_length)}
        several = {'by_length': by_length} if len(by_length) > 1 else {}
        return {key: getattr(self, key) for key in SCORES} | lengths | several


def score(eval_batch: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]], batches: Any, step: int) -> Scores:
    """Scores every row of ``batches``.

    Args:
      eval_batch: batch -> ``{'nll': sum of nats, 'correct': right predictions, 'tokens': their number}``; results are
        fetched one batch late, so that the device never waits.
      batches: held-out rows, each target once: ``HeldoutBatches`` or ``SyntheticHeldout``.
      step: what to call the checkpoint.
    """
    sums: dict[int, list[float]] = {}  # of each length: nats, right predictions, tokens
    pending = None
    dispatched = ((batch['tokens'].shape[1], eval_batch(batch)) for batch in stuck.each(batches))
    for item in itertools.chain(dispatched, [None]):
        if pending is not None:
            length, result = pending
            values = (float(result['nll']), float(result['correct']), int(result['tokens']))
            sums[length] = [a + b for a, b in zip(sums.get(length, (0.0, 0.0, 0)), values, strict=True)]
        pending = item
    parts = {length: Part(n / max(t, 1), c / max(t, 1), int(t)) for length, (n, c, t) in sums.items()}
    nll, correct, tokens = (sum(values) for values in zip(*sums.values(), strict=True))
    back = getattr(batches, 'round_trip', 1.0)  # a task has no text
    bits = nll / math.log(2) / batches.num_bytes if batches.num_bytes and back == 1 else None
    most = max(tokens, 1)
    return Scores(step, nll / most, correct / most, bits, int(tokens), round(batches.num_bytes), parts, back)


def _documents(paths: Sequence[str], config: ml_collections.ConfigDict) -> list[Document]:
    """The documents of files."""
    skipped = files.Skipped() if config.data.bad_records == 'skip' else None
    documents = [document for file in paths for document in files.read(file, config.data.text_field, skipped)]
    if skipped and skipped.count:
        print(skipped, file=sys.stderr)
    return documents


def _require_same_everywhere(documents: Sequence[Document]) -> None:
    """Refuses files that are others for another process, with which it would score other rows, or more of them."""
    if jax.process_count() == 1:
        return
    lengths = ' '.join(str(len(document.text)) for document in documents)
    digest = hashlib.sha256(lengths.encode())
    for document in documents:
        digest.update(document.text.encode())
    if len(set(processes.of_each(digest.hexdigest()))) > 1:
        raise UserError('the files to score are not the same for all processes; put them where all find them')


def rows_to_score(
    trained: TrainedModel, config: ml_collections.ConfigDict, workdir: str | Path, paths: Sequence[str], batch_size: int
) -> Any:
    """The batches of given files or, without any, of the held-out text or task of a run: each target once.

    Of several processes each has the rows that its devices take.

    Args:
      trained: the run's model.
      config: the run's configuration, with what is to be otherwise.
      workdir: what the run is called.
      paths: as ``data.files.given`` has them.
      batch_size: rows of a batch; 0 means the run's own.

    Raises:
      UserError: no such file, a tokenizer that is not the store's, other data, or rows that the mesh does not divide.
    """
    rows, place, share = batch_size or config.eval.batch_size, trained.place, WHOLE
    if place:
        divides(axes.ROWS, axes.rows(place.mesh.shape), '--batch-size', rows)
        share = Share(*own_rows(place.mesh))
    if paths:
        if is_synthetic(config.data):
            raise UserError(f'{workdir} was trained on {config.data.sources[0]}, not on text: leave out the files')
        documents = _documents(paths, config)
        _require_same_everywhere(documents)
        return heldout_from_texts(documents, trained.tokenizer, config, rows, share)
    if not trained.data:
        raise UserError(f'{workdir} was not trained here, so that no text of it is held out; name files to score')
    dataset = open_dataset(config, trained.data)
    dataset.require_tokenizer(trained.tokenizer, f'{workdir} (checkpoint {trained.step})')
    if trained.data != dataset.identity:
        raise UserError(
            f'the data of data.sources is not what {workdir} was trained on: some of it may be held out no longer;'
            ' restore it, or name files to score'
        )
    return dataset.heldout_batches(rows, share=share)


def _with_lengths(config: ml_collections.ConfigDict, lengths: Sequence[int], shards: int) -> ml_collections.ConfigDict:
    """The configuration with other lengths to score at, on a mesh that splits rows into so many shards."""
    if is_synthetic(config.data):
        config.data.synthetic.eval_lengths = tuple(lengths)
    elif len(lengths) > 1:
        raise UserError('text is cut into rows of one length; give --lengths one number of tokens')
    elif lengths[0] < 2:
        raise UserError(f'--lengths {lengths[0]} must be at least 2')
    else:
        config.data.seq_len = lengths[0]
    for length in lengths:
        divides('mesh.context', shards, '--lengths', length)
    config.mesh.update(configs.default().mesh)  # of training, which does not have to divide them
    return configs.validate(config)


def evaluate(
    workdir: str | Path,
    paths: Sequence[str] = (),
    step: int | str | None = None,
    batch_size: int = 0,
    lengths: Sequence[int] = (),
    mesh: Sequence[str] = (),
) -> Scores:
    """Scores a checkpoint on its run's held-out text or task, or on given text files.

    Args:
      workdir: a run directory.
      paths: files or globs, of which each file is scored once; none means the held-out split.
      step: a checkpoint's step, ``'best'`` or None for the newest.
      batch_size: rows of a batch; 0 means the run's own.
      lengths: tokens of a synthetic task's sequences, in place of the run's ``data.synthetic.eval_lengths``; or one, of
        the rows into which text is cut, in place of its ``data.seq_len``.
      mesh: overrides of ``load_model``: scores are those of one device, up to rounding.

    Raises:
      UserError: no such checkpoint or file, a tokenizer that is not the store's, or lengths or a mesh that do not fit.
    """
    paths = files.given(paths)  # first, for loading a model takes a while
    trained = load_model(workdir, step, mesh)
    config = trained.config
    if lengths:
        config = _with_lengths(config, lengths, trained.place.mesh.shape['context'] if trained.place else 1)
    batches, place = rows_to_score(trained, config, workdir, paths, batch_size), trained.place
    graphdef, variables = nnx.split(trained.model)

    @functools.partial(jax.jit, out_shardings=replicated(place.mesh) if place else None)
    def eval_batch(variables: nnx.State, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        with place.entered() if place else contextlib.nullcontext():
            return steps.eval_step(config, nnx.merge(graphdef, variables), batch)

    def put(batch: Mapping[str, np.ndarray]) -> Mapping[str, jax.Array]:
        batch = {key: batch[key] for key in steps.BATCH_KEYS}
        return place_rows(batch, place.mesh) if place else jax.tree.map(jnp.asarray, batch)

    return score(lambda batch: eval_batch(variables, put(batch)), batches, trained.step)
