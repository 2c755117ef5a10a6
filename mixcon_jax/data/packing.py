"""Rows of T tokens as an index: which documents, and which parts of them, row i of an epoch consists of.

Nothing here depends on a random generator of a library, whose streams may change between versions: orders come from a
keyed bijection of the integers, so a row is the same everywhere and always.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt64

from mixcon_jax.errors import UserError

MASK = (1 << 64) - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ROUNDS = 6  # with 4, permutations of a handful of entries are visibly uneven


def mix(value: int) -> int:
    """The finaliser of splitmix64, a bijection of 64-bit integers (Steele, Lea and Flood, OOPSLA 2014)."""
    value = ((value ^ (value >> 30)) * FIRST) & MASK
    value = ((value ^ (value >> 27)) * SECOND) & MASK
    return value ^ (value >> 31)


def mix_array(value: UInt64[np.ndarray, 'n']) -> UInt64[np.ndarray, 'n']:
    """``mix`` of every element."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(FIRST)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(SECOND)
    return value ^ (value >> np.uint64(31))


def key_of(*parts: int) -> int:
    """A 64-bit key that depends on every part and on their order."""
    state = 0
    for part in parts:
        state = mix(((state + GOLDEN) & MASK) ^ mix(part & MASK))
    return state


class Permutation:
    """A permutation of ``range(size)`` that ``key`` names, in constant memory: single entries of billions are cheap.

    A Feistel network over the next even number of bits, repeated while it leads outside the range.

    Args:
      size: At least 1.
      key: Any integers, for example (seed, epoch).
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._half = max((size - 1).bit_length() + 1, 2) // 2
        self._keys = [key_of(*key, r) for r in range(ROUNDS)]

    def __getitem__(self, index: int) -> int:
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = index >> half, index & mask
            for k in self._keys:
                left, right = right, left ^ (mix(right ^ k) & mask)
            index = (left << half) | right
            if index < self.size:
                return index

    def array(self) -> Int[np.ndarray, 'size']:
        """The whole permutation."""
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        result = np.arange(self.size, dtype=np.uint64)
        todo = np.arange(self.size)
        while todo.size:
            value = result[todo]
            left, right = value >> half, value & mask
            for k in self._keys:
                left, right = right, left ^ (mix_array(right ^ np.uint64(k)) & mask)
            value = (left << half) | right
            result[todo] = value
            todo = todo[value >= np.uint64(self.size)]
        return result.astype(np.int64)


@dataclass(frozen=True)
class Plan:
    """One epoch: documents in their order, laid end to end, and cut every T targets.

    A document of n tokens has n + 1 targets, its tokens and end-of-text. Without packing every document begins a row of
    its own. The arrays have one entry a document, whatever the number of tokens.
    """

    seq_len: int
    order: Int[np.ndarray, 'documents']
    targets: Int[np.ndarray, 'documents']  # n + 1, in that order
    ends: Int[np.ndarray, 'documents']  # where each document's place ends, in targets from the start of the epoch

    @property
    def num_rows(self) -> int:
        return -(-int(self.ends[-1]) // self.seq_len) if self.ends.size else 0

    def spans(self, row: int) -> tuple[Int[np.ndarray, 's'], Int[np.ndarray, 's'], Int[np.ndarray, 's']]:
        """The documents of a row, and the first target and the target past the last that the row takes of each."""
        low = row * self.seq_len
        high = min(low + self.seq_len, int(self.ends[-1]))
        first = int(np.searchsorted(self.ends, low, 'right'))
        last = int(np.searchsorted(self.ends, high, 'left'))
        places = slice(first, last + 1)
        starts = np.concatenate([self.ends[first - 1 : first] if first else [0], self.ends[first:last]])
        begin = np.maximum(low - starts, 0)
        # Without packing a place is longer than its document by the padding of the last row.
        end = np.minimum(high - starts, self.targets[places])
        return self.order[places], begin.astype(np.int64), end


def make_plan(lengths: Int[np.ndarray, 'documents'], seq_len: int, packing: bool, key: tuple[int, ...] | None) -> Plan:
    """The plan of an epoch over documents of ``lengths`` tokens.

    Args:
      lengths: Tokens of each document.
      seq_len: Targets T of a row.
      packing: Lay documents end to end; otherwise each begins its own row.
      key: Names the order of the documents; None keeps theirs.
    """
    order = np.arange(lengths.size)
    if key is not None and lengths.size:
        order = Permutation(lengths.size, *key, 0).array()
    targets = lengths[order].astype(np.int64) + 1
    places = targets if packing else -(-targets // seq_len) * seq_len
    return Plan(seq_len, order, targets, np.cumsum(places))


class Rows:
    """Random access to the rows of a store, epoch after epoch; thread-safe.

    Row ``i`` belongs to epoch ``i // num_rows``. In every epoch the documents are laid out in a new order and the rows
    are drawn in a new order, so that neighbours come from different documents.

    Args:
      store: A ``TokenStore``.
      seq_len: Tokens T a row.
      seed: Names the order; None keeps the order of the store, the same in every epoch.
      packing: Pack several documents into a row.
    """

    def __init__(self, store, seq_len: int, seed: int | None, packing: bool = True) -> None:
        self.store, self.seq_len, self.seed, self.packing = store, seq_len, seed, packing
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._lock = threading.Lock()
        self.num_rows = self.plan(0).num_rows  # the same in every epoch: only the order of the documents changes

    def __len__(self) -> int:
        return self.num_rows

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch; the last two are kept, for batches and prefetching cross from one to the next."""
        epoch = 0 if self.seed is None else epoch
        with self._lock:
            if epoch not in self._plans:
                key = None if self.seed is None else (self.seed, epoch)
                self._plans[epoch] = make_plan(self.store.lengths, self.seq_len, self.packing, key)
                while len(self._plans) > 2:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(epoch)
            return self._plans[epoch]

    def spans(self, index: int) -> tuple[Int[np.ndarray, 's'], Int[np.ndarray, 's'], Int[np.ndarray, 's']]:
        """``Plan.spans`` of row ``index``, counted through the epochs and drawn in the order of its epoch."""
        epoch, row = divmod(index, self.num_rows)
        if self.seed is not None:
            row = Permutation(self.num_rows, self.seed, epoch, 1)[row]
        return self.plan(epoch).spans(row)

    def fill(self, batch: dict[str, np.ndarray], places: list[int], indices: list[int]) -> None:
        """Writes rows ``indices`` into rows ``places`` of a batch of zeros (see ``empty_batch``)."""
        store = self.store
        spans = [self.spans(index) for index in indices]
        documents = np.concatenate([s[0] for s in spans])
        begin = np.concatenate([s[1] for s in spans])
        end = np.concatenate([s[2] for s in spans])
        starts, lengths = store.starts[documents], store.lengths[documents]
        # The input before target j is token j - 1, so one read gives a span's inputs and its targets.
        pieces = iter(store.read_many(starts + np.maximum(begin - 1, 0), starts + np.minimum(end, lengths)))
        bounds = iter(zip(begin.tolist(), end.tolist(), lengths.tolist(), strict=True))
        for place, row_spans in zip(places, spans, strict=True):
            tokens, targets, segments, positions = (
                batch[name][place] for name in ('tokens', 'targets', 'segment_ids', 'positions')
            )
            at = 0
            for segment in range(1, len(row_spans[0]) + 1):
                (b, e, n), piece = next(bounds), next(pieces)
                stop = at + e - b
                if b == 0:
                    tokens[at] = store.eot_id
                    tokens[at + 1 : stop] = piece[: e - 1]
                    targets[at : at + min(e, n)] = piece
                else:
                    tokens[at:stop] = piece[: e - b]
                    targets[at : at + min(e, n) - b] = piece[1:]
                if e > n:
                    targets[stop - 1] = store.eot_id
                segments[at:stop] = segment
                positions[at:stop] = np.arange(e - b)
                at = stop
            batch['loss_mask'][place, :at] = True


def empty_batch(rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """A batch [rows, T] of padding: tokens, targets, segment_ids and positions 0, loss_mask False."""
    batch = {name: np.zeros((rows, seq_len), np.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')}
    return batch | {'loss_mask': np.zeros((rows, seq_len), bool)}


@dataclass(frozen=True)
class Share:
    """What a process makes of every batch: some of the equal parts that its rows are divided into.

    Several processes may make the same parts, where a mesh axis that shares out no rows goes across them.

    Attributes:
      parts: Numbers of its parts, ascending.
      count: Number of all parts.
    """

    parts: tuple[int, ...] = (0,)
    count: int = 1

    def rows(self, total: int, key: str) -> list[int]:
        """Which rows of a batch of ``total`` it makes, ascending.

        Raises:
          UserError: The parts are not equal; ``key`` is the option to blame.
        """
        if total % self.count:
            raise UserError(f'{key}: {total} rows cannot be divided into {self.count} equal parts')
        size = total // self.count
        return [row for part in self.parts for row in range(part * size, (part + 1) * size)]


WHOLE = Share()
