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
    """Which documents are held out: those whose hash, as a number in [0, 1), is below ``fraction``.

    So a document's side depends on its text alone: it is the same in every source and in every mixture, however they
    grow. Only where a whole mixture would be left with an empty side (a small one), every document is cut instead, and
    its last ``fraction`` is held out. To find out, documents are read until both sides have one.

    Attributes:
      cuts: Whether documents are cut: a mixture with other text beside them may train on what is held out here.

    Args:
      documents: Those of all sources of the mixture; None if their split is the hash's whatever they are.
      fraction: Of the documents.
      name: Of the mixture, for errors.

    Raises:
      UserError: No document has text, or none that has can be cut.
    """

    def __init__(self, documents: Iterable[Document] | None, fraction: float, name: str = 'corpus') -> None:
        self.fraction = fraction
        self.threshold = int(fraction * 2**64)
        self.cuts = False
        if documents is None:
            return
        longest, count, sides = Document('', ''), 0, set()
        for document in documents:
            count += 1
            if not document.text:
                continue
            longest = max(longest, document, key=lambda document: len(document.text))
            sides.add(text_hash(document.text.encode()) < self.threshold)
            if len(sides) > 1:
                return
        if not longest.text:
            raise UserError(f"data.sources: '{name}' is empty: {count} documents, none of them with text")
        cut(longest, fraction)
        self.cuts = True

    def place(self, documents: Iterable[Document]) -> Iterator[Placed]:
        """Yields every document that has text, with its side, or its two parts."""
        for document in documents:
            if self.cuts and len(document.text) > 1:
                for part, heldout in zip(cut(document, self.fraction), (False, True), strict=True):
                    yield Placed(part.text, part.text.encode(), heldout)
            elif document.text:
                data = document.text.encode()
                yield Placed(document.text, data, not self.cuts and text_hash(data) < self.threshold)


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
