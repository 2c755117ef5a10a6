"""A document, and the split of documents into training and held-out text."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mixcon_jax.errors import UserError

SPLITS = ('train', 'heldout')


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
    """Which documents of a corpus are held out: those whose hash, as a number in [0, 1), is below ``fraction``.

    So a document's side depends on its text alone, however the corpus grows. Where that leaves a side empty (a small
    corpus), the threshold moves just far enough for the document of smallest or largest hash to change sides, and a
    corpus of one document (or of copies of one) is cut: its last ``fraction`` is held out. To find out, documents are
    read until both sides have one.

    Raises:
      UserError: No document has text, or the only document has a single character.
    """

    def __init__(self, documents: Iterable[Document], fraction: float, name: str = 'corpus') -> None:
        self.fraction = fraction
        self.threshold = int(fraction * 2**64)
        self.only: Document | None = None
        lowest, highest, first, count = 1 << 64, -1, None, 0
        for document in documents:
            count += 1
            if not document.text:
                continue
            first = first or document
            value = text_hash(document.text.encode())
            lowest, highest = min(lowest, value), max(highest, value)
            if lowest < self.threshold <= highest:
                return
        if first is None:
            raise UserError(f"data.sources: '{name}' is empty: {count} documents, none of them with text")
        if lowest == highest:
            self.only = first
            self._parts = cut(first, fraction)
        else:
            self.threshold = highest if highest < self.threshold else lowest + 1

    def place(self, documents: Iterable[Document]) -> Iterator[Placed]:
        """Yields every document that has text, with its side."""
        if self.only:
            for part, heldout in zip(self._parts, (False, True), strict=True):
                yield Placed(part.text, part.text.encode(), heldout)
            return
        for document in documents:
            if document.text:
                data = document.text.encode()
                yield Placed(document.text, data, text_hash(data) < self.threshold)


def cut(document: Document, fraction: float) -> tuple[Document, Document]:
    """Cuts a corpus of one document in two: its last ``fraction`` is held out.

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
