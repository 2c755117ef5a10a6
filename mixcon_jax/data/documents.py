"""A document, and the split of documents into training and held-out text."""

import hashlib
import math
from array import array
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mixcon_jax.errors import UserError

SPLITS = ('train', 'heldout')
TAIL = 64  # characters that a part of a document which is cut has at least, unless it is the only one


class EmptyError(UserError):
    """There is no text."""


class Document(NamedTuple):
    """A text and where it came from (a path, a line, a record)."""

    text: str
    name: str


class Placed(NamedTuple):
    """A document's text, its UTF-8 bytes, and whether it is held out."""

    text: str
    data: bytes
    heldout: bool


def text_hash(data: bytes) -> int:
    """64-bit hash of a document's UTF-8 bytes; it decides the split, so equal texts fall on the same side."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little')


class Split:
    """Which documents are held out: those whose hash, as a number in [0, 1), is below ``fraction``.

    So a document's side depends on its text alone: it is the same in every source and in every mixture, however they
    grow. Only a whole mixture that would be left with an empty side (a small one) is split in another way. If most of
    its text is in documents that are long enough, these are cut, and the last ``fraction`` of each is held out; else
    the documents with the smallest hashes are held out, until they are ``fraction`` of the bytes. To find out,
    documents are read until both sides have one.

    Attributes:
      kind: 'hash', 'cut' or 'rank'. But for 'hash', a mixture with other text beside it may train on what is held out
        here.
      fraction: As given.
      threshold: Documents are held out whose hash, of 64 bits, is below it; unless they are cut.
      shortest: Characters of the shortest document that is cut: both of its parts are long enough to be of use.

    Args:
      documents: Those of all sources of the mixture; None if their split is the hash's whatever they are.
      fraction: Of the documents.
      name: Of the mixture, for errors.
      sides: Those that other text of the mixture, which the hash splits, is on: True where it is held out.

    Raises:
      EmptyError: No document has text.
      UserError: The only document that has cannot be cut.
    """

    def __init__(
        self,
        documents: Iterable[Document] | None,
        fraction: float,
        name: str = 'corpus',
        sides: Collection[bool] = (),
    ) -> None:
        self.kind, self.fraction = 'hash', fraction
        self.threshold, self.shortest = int(fraction * 2**64), math.ceil(TAIL / min(fraction, 1 - fraction))
        seen = set(sides)
        if documents is None or len(seen) > 1:
            return
        hashes, sizes = array('Q'), array('Q')
        count, useful, any_text = 0, 0, Document('', '')
        for document in documents:
            count += 1
            if not document.text:
                continue
            any_text, data = document, document.text.encode()
            hashes.append(text_hash(data))
            sizes.append(len(data))
            useful += len(data) * (len(document.text) >= self.shortest)
            seen.add(hashes[-1] < self.threshold)
            if len(seen) > 1:
                return
        if not hashes:
            raise EmptyError(f"data.sources: '{name}' is empty: {count} documents, none of them with text")
        distinct, first = np.unique(np.array(hashes, np.uint64), return_index=True)  # in the order of the hashes
        if len(distinct) == 1:
            cut(any_text, fraction)
            self.kind, self.shortest = 'cut', 2
        elif 2 * useful >= sum(sizes):
            self.kind = 'cut'
        else:
            held = np.cumsum(np.array(sizes, np.uint64)[first], dtype=np.float64)
            number = int(np.searchsorted(held, fraction * held[-1])) + 1
            self.kind, self.threshold = 'rank', int(distinct[min(number, len(distinct) - 1)])

    def place(self, documents: Iterable[Document]) -> Iterator[Placed]:
        """Yields every document that has text, with its side, or its two parts."""
        for document in documents:
            if self.kind == 'cut' and len(document.text) >= self.shortest:
                for part, heldout in zip(cut(document, self.fraction), (False, True), strict=True):
                    yield Placed(part.text, part.text.encode(), heldout)
            elif document.text:
                data = document.text.encode()
                yield Placed(document.text, data, self.kind != 'cut' and text_hash(data) < self.threshold)


def cut(document: Document, fraction: float) -> tuple[Document, Document]:
    """Cuts a document in two: its last ``fraction`` is held out.

    The cut is moved to the end of a line where one is near (within half of the held-out part).

    Raises:
      UserError: The document has fewer than two characters.
    """
    text, size = document.text, len(document.text)
    if size < 2:
        raise UserError(
            f'{document.name}: one document of {size} character cannot be split into training and held-out text'
        )
    at = min(max(size - max(round(size * fraction), 1), 1), size - 1)
    newline = text.rfind('\n', max(at - (size - at) // 2, 0), at)
    if newline >= 0:
        at = newline + 1
    return Document(text[:at], document.name), Document(text[at:], document.name + ' (held-out end)')
