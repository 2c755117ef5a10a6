"""What is counted while text is prepared: bytes, gzip, what comes back of them, and how fast it goes."""

import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from mixcon_jax.data.background import PROGRESS_SECONDS
from mixcon_jax.data.documents import SPLITS, Placed
from mixcon_jax.data.tokenizer import Piece, Tokenizer

GZIP_LIMIT = 256 << 20  # bytes of held-out text that the gzip baseline compresses
SAMPLE = 4 << 20  # bytes of training text that are decoded again; held-out text all is

Say = Callable[[str], None]


class Statistics:
    """Counts of bytes, and what gzip makes of the held-out text."""

    def __init__(self) -> None:
        self._counts: list[Int[np.ndarray, '256']] = [np.zeros(256, np.int64) for _ in range(2)]
        self._gzip, self._gzip_in, self._gzip_out = zlib.compressobj(9, wbits=31), 0, 0

    def add(self, batch: Iterable[Placed]) -> None:
        for heldout in (False, True):
            joined = b''.join(document.data for document in batch if document.heldout == heldout)
            self._counts[heldout] += np.bincount(np.frombuffer(joined, np.uint8), minlength=256)
        for document in batch:
            if document.heldout and self._gzip_in < GZIP_LIMIT:
                self._gzip_in += len(document.data)
                self._gzip_out += len(self._gzip.compress(document.data + b'\0'))

    def record(self) -> dict[str, Any]:
        self._gzip_out += len(self._gzip.flush())
        train, heldout = (counts.tolist() for counts in self._counts)
        return {
            'train_bytes': train, 'heldout_bytes': heldout, 'gzip_in': self._gzip_in, 'gzip_out': self._gzip_out,
        }  # fmt: skip


class RoundTrip:
    """Encodes, and measures how much decoding gives back: of all held-out text, and of the first of the training text.

    Every piece that is encoded by itself is compared with itself, so memory is bounded however long a document is, and
    where long ones are cut does not matter.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._back, self._measured = [0, 0], [0, 0]

    def encode(
        self, batch: Sequence[Placed], stopped: Callable[[], bool] = lambda: False
    ) -> list[Integer[np.ndarray, '_']]:
        """``Tokenizer.encode_batch`` of the documents."""

        def measure(pieces: list[Piece]) -> None:
            for heldout in (False, True):
                mine = [piece for piece in pieces if batch[piece.number].heldout == heldout]
                if mine and (heldout or self._measured[heldout] < SAMPLE):
                    self._back[heldout] += self._tokenizer.round_trip(mine)
                    self._measured[heldout] += sum(len(piece.text.encode()) for piece in mine)

        return self._tokenizer.encode_batch([document.text for document in batch], stopped, measure)

    def record(self) -> dict[str, float]:
        """The share of the bytes that come back, of each split; 1.0 only if every byte does."""
        sides = zip(SPLITS, self._back, self._measured, strict=True)
        return {split: back / measured if measured else 1.0 for split, back, measured in sides}


class Progress:
    """A line every few seconds."""

    def __init__(self, spec: str, say: Say) -> None:
        self._spec, self._say = spec, say
        self._begin = self._last = time.monotonic()
        self._documents = self._bytes = 0

    def add(self, documents: int, num_bytes: int) -> None:
        self._documents, self._bytes = self._documents + documents, self._bytes + num_bytes
        self.still()

    def still(self, waited: float = 0.0) -> None:
        """Says how far it is, unless it was said a moment ago."""
        if time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._last = time.monotonic()
            self._say(self._line())

    def done(self, tokens: int) -> None:
        self._say(f'{self._line()}, {tokens:,} tokens')

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        megabytes = self._bytes / 1e6
        return (
            f'{self._spec}: {self._documents:,} documents, {megabytes:,.1f} MB in {math.ceil(seconds)} s '
            f'({self._documents / seconds:,.0f} documents/s, {megabytes / seconds:,.1f} MB/s)'
        )
