"""Batches: which rows of which store make up batch i, read ahead by grain threads.

A batch is a function of (seed, i) alone, so the position of a run is one integer, its step, for any number of processes
and threads. All batches are dicts of arrays [B, T]:

    tokens, targets   int32   inputs and what they predict: a document reads [eot, t1 .. tn], predicts [t1 .. tn, eot]
    loss_mask         bool    the target is real
    segment_ids       int32   which document of its row a token belongs to, from 1; 0 is padding
    positions         int32   place within the document's span; 0 starts one
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from mixcon_jax.data.documents import Document, Placed
from mixcon_jax.data.packing import WHOLE, Rows, Share, empty_batch, key_of
from mixcon_jax.data.prepared import PreparedStore
from mixcon_jax.data.statistics import RoundTrip
from mixcon_jax.data.store import TokenStore
from mixcon_jax.data.tokenizer import Tokenizer
from mixcon_jax.errors import UserError

Batch = dict[str, np.ndarray]
WEIGHT_BITS = 32
ENDLESS = 1 << 40  # batches in an endless dataset


class Mixture:
    """Divides an endless sequence of draws among sources in exact proportion, with random access.

    Source 0 takes draw i when floor((i + 1) w0) exceeds floor(i w0), and the other sources divide what is left in the
    same way; so after any number of draws each source is within (number of sources) draws of its share. Integer
    arithmetic keeps that true for any i.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(np.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
            raise UserError(f'data.weights: {tuple(weights)}: weights are at least 0 and one of them is above 0')
        self._shares = []
        rest = float(sum(weights))
        for weight in weights:
            share = round(weight / rest * (1 << WEIGHT_BITS)) if rest > 0 else 1 << WEIGHT_BITS
            self._shares.append(min(share, 1 << WEIGHT_BITS))
            rest -= weight
        last = max(i for i, weight in enumerate(weights) if weight > 0)
        self._shares[last] = 1 << WEIGHT_BITS  # whatever was rounded away: every draw has a source

    def __call__(self, draw: int) -> tuple[int, int]:
        """The source of a draw, and how many draws that source had before."""
        for source, share in enumerate(self._shares):
            before = draw * share >> WEIGHT_BITS
            if (draw + 1) * share >> WEIGHT_BITS > before:
                return source, before
            draw -= before
        raise AssertionError('the last source takes every draw that is left')

    def counts(self, draws: int) -> list[int]:
        """How many of the first ``draws`` draws each source takes."""
        counts = []
        for share in self._shares:
            counts.append(draws * share >> WEIGHT_BITS)
            draws -= counts[-1]
        return counts


class _Batches:
    """A random-access source of batches for grain."""

    def __init__(self, count: int, make: Any, name: str) -> None:
        self._count, self._make, self._name = count, make, name

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        return self._make(index)

    def __repr__(self) -> str:
        return self._name


def _iterate(source: _Batches, start: int, num_threads: int, prefetch: int) -> Generator[Batch]:
    import grain  # with it comes JAX, which preparing text has no use for: seconds

    dataset = grain.MapDataset.source(source)
    threads = num_threads if prefetch else 0
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))
    iterator.set_state({'next_index': start})
    try:
        yield from iterator
    finally:
        iterator.close()


def _open(stores: Sequence[PreparedStore | TokenStore], split: str) -> list[TokenStore]:
    opened = [store.open(split) if isinstance(store, PreparedStore) else store for store in stores]
    if not opened:
        raise UserError('data.sources: no store to read')
    for store in opened:
        if store.tokenizer_fingerprint != opened[0].tokenizer_fingerprint:
            raise UserError(f'{store.path}: made by another tokenizer than {opened[0].path}; prepare them together')
    if not any(store.num_targets for store in opened):
        raise UserError(f'{", ".join(store.path for store in opened)}: no {split} documents')
    return opened


class TrainBatches:
    """Endless training batches; batch i depends on the seed, i and the stores alone.

    Every store is read epoch by epoch: each of its targets once an epoch, rows in a new order each time. With several
    stores, rows are divided among them in proportion to ``data.weights``; without weights, in proportion to size, so
    that their epochs end together.

    Attributes:
      num_tokens: Targets of all stores, once.
      rows: ``Rows`` of each store.

    Args:
      config: The whole configuration: seed, data.* and train.batch_size, the rows B of the global batch.
      stores: Of ``prepare``, or opened.
      share: Which rows of every batch to make.

    Raises:
      UserError: Weights do not fit the stores, B does not divide, or stores do not fit each other.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        stores: Sequence[PreparedStore | TokenStore],
        share: Share = WHOLE,
    ) -> None:
        data = config.data
        self.stores = _open(stores, 'train')
        weights = tuple(data.weights)
        if weights and len(weights) != len(self.stores):
            raise UserError(f'data.weights: {len(weights)} weights for {len(self.stores)} sources')
        for store, weight in zip(self.stores, weights, strict=False):
            if weight and not store.num_targets:
                raise UserError(
                    f'data.weights: a weight of {weight} for {store.path}, all of whose documents are held out;'
                    ' give it more documents, or leave it out'
                )
        self.batch_size, self.seq_len = config.train.batch_size, data.seq_len
        self._own = share.rows(self.batch_size, 'train.batch_size')
        # A seed of its own for every store, or two copies of one would be read in step.
        self.rows = [
            Rows(store, data.seq_len, key_of(config.seed, i), data.packing) for i, store in enumerate(self.stores)
        ]
        self.mixture = Mixture(weights or [rows.num_rows for rows in self.rows])
        self.num_tokens = sum(store.num_targets for store in self.stores)
        self._num_threads, self._prefetch = data.num_threads, data.prefetch

    def __getitem__(self, index: int) -> Batch:
        """This process's share of batch ``index``, [rows of its own, T]."""
        batch = empty_batch(len(self._own), self.seq_len)
        draws = [self.mixture(index * self.batch_size + row) for row in self._own]
        for source, rows in enumerate(self.rows):
            places = [place for place, draw in enumerate(draws) if draw[0] == source]
            if places:
                rows.fill(batch, places, [draws[place][1] for place in places])
        return batch

    def epochs(self, step: int) -> list[float]:
        """How often each store has been read after ``step`` batches."""
        counts = self.mixture.counts(step * self.batch_size)
        return [count / max(rows.num_rows, 1) for count, rows in zip(counts, self.rows, strict=True)]

    def iterate(self, start_step: int = 0) -> Generator[Batch]:
        """Batches from ``start_step`` on, without end, prepared ahead by data.num_threads threads."""
        source = _Batches(ENDLESS, self.__getitem__, 'TrainBatches')
        return _iterate(source, start_step, self._num_threads, self._prefetch)


class HeldoutBatches:
    """Held-out batches: every target exactly once, in the order of the stores; iterate as often as needed.

    The last batch is filled up with rows of padding (segment_ids 0, loss_mask False).

    Attributes:
      num_tokens: Targets of all rows.
      num_bytes: Bytes of the original text that they stand for: bits per byte is nll / ln 2 / num_bytes, with nll the
        sum over all targets in nats. With ``max_rows``, a share of all bytes in proportion to the targets.
      round_trip: The share of those bytes that decoding the tokens gives back: below 1, or None where it was never
        measured, nobody knows what it costs to predict the text, and there are no bits per byte.
      num_rows: Rows that are scored.
      lengths: Of a task's sequences; text has none.

    Args:
      config: The whole configuration; data.* is used.
      stores: Of ``prepare``, or opened.
      batch_size: Rows B of a batch; 0 means train.batch_size.
      max_rows: Score only so many rows, spread evenly over all; 0 means all.
      share: Which rows of every batch to make.
    """

    lengths = ()

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        stores: Sequence[PreparedStore | TokenStore],
        batch_size: int,
        *,
        max_rows: int = 0,
        share: Share = WHOLE,
    ) -> None:
        data = config.data
        self.stores = _open(stores, 'heldout')
        self.batch_size, self.seq_len = batch_size or config.train.batch_size, data.seq_len
        self._own = share.rows(self.batch_size, 'eval.batch_size')
        self.rows = [Rows(store, data.seq_len, None, data.packing) for store in self.stores]
        self._starts = np.cumsum([0] + [rows.num_rows for rows in self.rows])
        total = int(self._starts[-1])
        self.num_rows = min(max_rows, total) if max_rows else total
        self._chosen = np.arange(self.num_rows) * total // self.num_rows
        self.num_tokens = sum(store.num_targets for store in self.stores)
        self.num_bytes: float = sum(store.num_bytes for store in self.stores)
        known = [(store.round_trip, store.num_bytes) for store in self.stores if store.num_bytes]
        self.round_trip: float | None = 1.0
        if any(share is None for share, _ in known):
            self.round_trip = None
        elif any(share != 1 for share, _ in known):
            self.round_trip = sum((share or 0.0) * size for share, size in known) / self.num_bytes
        if self.num_rows < total:
            scored = sum(int(end.sum() - begin.sum()) for _, begin, end in map(self._spans, self._chosen.tolist()))
            self.num_bytes = self.num_bytes * scored / self.num_tokens
            self.num_tokens = scored
        self._num_threads, self._prefetch = data.num_threads, data.prefetch

    def _locate(self, row: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._starts, row, 'right')) - 1
        return source, row - int(self._starts[source])

    def _spans(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source, index = self._locate(row)
        return self.rows[source].spans(index)

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        """This process's share of batch ``index``, [rows of its own, T]."""
        batch = empty_batch(len(self._own), self.seq_len)
        wanted = [index * self.batch_size + row for row in self._own]
        located = [self._locate(int(self._chosen[row])) for row in wanted if row < self.num_rows]
        for source, rows in enumerate(self.rows):
            places = [place for place, where in enumerate(located) if where[0] == source]
            if places:
                rows.fill(batch, places, [located[place][1] for place in places])
        return batch

    def __iter__(self) -> Iterator[Batch]:
        source = _Batches(len(self), self.__getitem__, 'HeldoutBatches')
        return _iterate(source, 0, self._num_threads, self._prefetch)


def heldout_from_texts(
    documents: Iterable[str | Document],
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    batch_size: int,
    share: Share = WHOLE,
) -> HeldoutBatches:
    """``HeldoutBatches`` of given texts, each a document, for scoring files that are no part of the run's data.

    ``open_source('files:GLOB')`` yields such documents.

    Raises:
      UserError: No document has text.
    """
    texts = [document if isinstance(document, str) else document.text for document in documents]
    placed = [Placed(text, text.encode(), heldout=True) for text in texts if text]
    if not placed:
        raise UserError('no text to evaluate: every document is empty')
    round_trip = RoundTrip(tokenizer)
    encoded = round_trip.encode(placed)
    num_bytes, back = sum(len(document.data) for document in placed), round_trip.record()['heldout']
    store = TokenStore.from_documents(encoded, num_bytes, tokenizer.eot_id, tokenizer.fingerprint, back)
    return HeldoutBatches(config, [store], batch_size, share=share)
