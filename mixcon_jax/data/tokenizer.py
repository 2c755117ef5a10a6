"""Byte-pair tokenizers: training, loading, encoding on all cores, and decoding one token at a time."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mixcon_jax.data.background import Background, until
from mixcon_jax.data.disk import scratch
from mixcon_jax.errors import UserError, first_line
from mixcon_jax.host.paths import expand

END_OF_TEXT = '<|endoftext|>'
# What widely used tokenizers call the token that ends a document, in the order of preference.
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    '<|end_of_text|>',
    '</s>',
    '<eos>',
    '<|eos|>',
    '<|im_end|>',
    '[EOS]',
    '<｜end▁of▁sentence｜>',
)
SAMPLE_BYTES = 64 << 20  # a tokenizer learns little more from further text
PIECE = 1 << 20  # characters encoded at once
GROUP = 2  # pieces a call of the library: what cannot be interrupted
CONTEXT = 16  # tokens with which the next is decoded
WORD = 256  # characters of the longest word that training sees


class Piece(NamedTuple):
    """What is encoded by itself: a text or, of a long one, a part."""

    number: int  # of the text among those that are encoded together
    text: str
    ids: Integer[np.ndarray, 'n']


class Tokenizer:
    """A Hugging Face ``tokenizers.Tokenizer`` with an end-of-text token.

    Attributes:
      vocab_size: Largest token id + 1.
      eot_id: Id of the token that begins and ends every document.
      eot: That token.
      fingerprint: sha256 of the tokenizer.json, in canonical form.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str = 'tokenizer') -> None:
        """Wraps ``backend``, which it changes: truncation and padding are switched off.

        Raises:
          UserError: No end-of-text token is known to it.
        """
        vocab = backend.get_vocab(with_added_tokens=True)
        eot = next((token for token in END_OF_TEXT_NAMES if token in vocab), None)
        if eot is None:
            raise UserError(f'{name}: no end-of-text token; add one of {" ".join(END_OF_TEXT_NAMES)} to its vocabulary')
        backend.no_truncation()
        backend.no_padding()
        self.eot, self.eot_id = eot, vocab[eot]
        self.vocab_size = max(vocab.values()) + 1
        self._json = backend.to_str()
        self.fingerprint = hashlib.sha256(json.dumps(json.loads(self._json), sort_keys=True).encode()).hexdigest()
        # A document that contains '<|endoftext|>' is about that token: encoding it as the token would cut the document.
        backend.encode_special_tokens = True
        self._backend = backend

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type of a token store: uint16 up to 65536 tokens, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without end-of-text; special tokens in it are plain text."""
        return self.encode_batch([text])[0].tolist()

    @cached_property
    def lossless(self) -> bool:
        """Whether any text comes back whole by construction: byte-level, all bytes known, nothing normalised."""
        parts = json.loads(self._json)
        model, before = parts['model'], parts['pre_tokenizer'] or {}
        steps = before.get('pretokenizers', [before])
        return (
            parts['normalizer'] is None
            and model['type'] == 'BPE'
            and (parts['decoder'] or {}).get('type') == 'ByteLevel'
            and any(step.get('type') == 'ByteLevel' for step in steps)
            and all(
                step['type'] in ('ByteLevel', 'Digits', 'Split')
                and not step.get('add_prefix_space')
                and step.get('behavior') != 'Removed'
                for step in steps
            )
            and not any(token['lstrip'] or token['rstrip'] or token['normalized'] for token in parts['added_tokens'])
            and set(pre_tokenizers.ByteLevel.alphabet()) <= set(model['vocab'])
        )

    def round_trip(self, pieces: Sequence[Piece]) -> int:
        """How many UTF-8 bytes of the pieces' texts decoding their tokens gives back; see ``came_back``."""
        decoded = self._backend.decode_batch([piece.ids.tolist() for piece in pieces], skip_special_tokens=False)
        return sum(came_back(piece.text, other) for piece, other in zip(pieces, decoded, strict=True))

    def encode_batch(
        self,
        texts: Sequence[str],
        stopped: Callable[[], bool] = lambda: False,
        seen: Callable[[list[Piece]], None] = lambda pieces: None,
    ) -> list[Integer[np.ndarray, '_']]:
        """Encodes texts on all cores.

        A text longer than about a million characters is encoded in pieces, cut before line ends where there are any,
        which bounds memory and spreads one long document over the cores.

        Args:
          texts: What to encode.
          stopped: Asked every few million characters; once it is true, what is returned is of no use.
          seen: Takes the pieces as they are encoded, a few million characters at once.
        """
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups((number, piece) for number, text in enumerate(texts) for piece in split_long(text, PIECE)):
            if stopped():
                break
            encoded = self._backend.encode_batch_fast([text for _, text in group], add_special_tokens=False)
            pieces = [
                Piece(number, text, np.array(one.ids, self.dtype))
                for (number, text), one in zip(group, encoded, strict=True)
            ]
            del encoded  # many bytes a token, which must not wait for what is done with the pieces
            for piece in pieces:
                parts[piece.number].append(piece.ids)
            seen(pieces)
        return [each[0] if len(each) == 1 else np.concatenate([np.zeros(0, self.dtype), *each]) for each in parts]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, 'n'], skip_special: bool = False) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        """The id of a token, special ones included; None of what is none."""
        return self._backend.token_to_id(token)

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._json

    def stream(self, after: Sequence[int] = (), skip_special: bool = True) -> 'StreamDecoder':
        """A decoder for tokens that arrive one by one, behind those of a text that is known."""
        return StreamDecoder(self, after, skip_special)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, atomically."""
        path = Path(path)
        temporary = scratch(path)
        try:
            with open(temporary, 'w', encoding='utf-8') as file:
                file.write(self._json)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class StreamDecoder:
    """Decodes tokens as they arrive; what ``push`` and ``flush`` return adds up to the text of all tokens.

    A character may take several tokens, so text is held back while it ends in a character that is not yet complete.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int], skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        # The last tokens already shown: some decoders leave out the space before the first token of a text.
        self._context = self._recent(list(after))
        self._pending: list[int] = []
        self._shown = 0  # characters of the pending tokens that have been returned

    def push(self, token: int) -> str:
        """Adds a token and returns the text that became certain, possibly empty."""
        self._pending.append(int(token))
        text = self._new_text()
        if text.endswith('\ufffd'):  # perhaps the beginning of a longer character, a mark for each byte of it
            known = len(text.rstrip('\ufffd'))
            certain, self._shown = text[self._shown : known], max(self._shown, known)
            return certain
        certain = text[self._shown :]
        self._context = self._recent(self._context + self._pending)
        self._pending, self._shown = [], 0
        return certain

    def flush(self) -> str:
        """Returns what is held back; call it after the last token."""
        rest = self._new_text()[self._shown :]
        self._context, self._pending, self._shown = [], [], 0
        return rest

    def _recent(self, tokens: list[int]) -> list[int]:
        """The last of them, a few but for those that would begin inside a character."""
        count = CONTEXT
        while count < len(tokens) and '\ufffd' in self._tokenizer.decode(tokens[-count:], self._skip_special):
            count *= 2
        return tokens[-count:]

    def _new_text(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._context, self._skip_special)
        return decode(self._context + self._pending, self._skip_special)[len(before) :]


def came_back(text: str, decoded: str) -> int:
    """UTF-8 bytes of ``text`` that are in ``decoded``: all when they are equal, else the words and spaces of both.

    Of unequal texts at least one byte is missing, though their words be the same in another order.
    """
    size = len(text.encode())
    if text == decoded:
        return size
    both = Counter(_WORDS.findall(text)) & Counter(_WORDS.findall(decoded))
    return max(min(sum(len(word.encode()) * count for word, count in both.items()), size - 1), 0)


_WORDS = re.compile(r'\s+|\S+')
_LONG = re.compile(rf'[^ \n]{{{WORD}}}|\s{{{WORD}}}')
_SPACE = re.compile(rf'(?<!\s)\s{{{WORD}}}')


def bounded_words(text: str) -> Iterator[str]:
    """Cuts a text wherever it goes on for ``WORD`` characters without a space, or with nothing but space.

    Training takes time in the square of the length of a word, and the words of text without spaces have no end.
    """
    start = 0
    longest = max(map(len, text.replace('\n', ' ').split(' ')))  # many times faster than to search for _LONG
    if longest >= WORD or _SPACE.search(text):
        for found in _LONG.finditer(text):
            yield text[start : found.end()]
            start = found.end()
    if start < len(text):
        yield text[start:]


def _groups(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Pieces together, as many as make about ``GROUP * PIECE`` characters."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[1])
        if size >= GROUP * PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def split_long(text: str, limit: int = PIECE) -> Iterator[str]:
    """Yields pieces of at most ``limit`` characters, cut before a line end where one is in the second half.

    Elsewhere not before a space, if that can be: some tokenizers begin every text with one, and drop it in decoding.
    """
    start = 0
    while len(text) - start > limit:
        at = text.rfind('\n', start + limit // 2, start + limit)
        if at <= start:
            before_space = len(text[start : start + limit + 1].rstrip(' ')) - 1
            at = start + (before_space if before_space > 0 else limit)
        yield text[start:at]
        start = at
    yield text[start:]


def train(texts: Iterable[str], vocab_size: int, still: Callable[[float], None] = lambda seconds: None) -> Tokenizer:
    """Trains a byte-level BPE: any text round-trips, every digit is a token of its own, '<|endoftext|>' is id 0.

    The same texts in the same order give the same tokenizer. Pass a sample (``SAMPLE_BYTES``): counts of distinct words
    are held in memory.

    Args:
      texts: Text to learn from.
      vocab_size: Tokens, at least 257; a small corpus may support fewer.
      still: Called every few seconds with the seconds that have passed.
    """
    if vocab_size < 257:
        raise UserError(f'data.tokenizer_vocab_size: {vocab_size} is too few; 256 bytes and {END_OF_TEXT} take 257')
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = (word for text in texts for piece in split_long(text) for word in bounded_words(piece))
    with Background(lambda stopped: backend.train_from_iterator(until(stopped, pieces), trainer)) as training:
        training.result(still)
    return Tokenizer(backend)


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer.json.

    Raises:
      UserError: The file is missing or is not a tokenizer.json, or it has no end-of-text token.
    """
    path = expand(path, 'data.tokenizer')
    if os.path.isdir(path):
        path = os.path.join(path, 'tokenizer.json')
    try:
        data = Path(path).read_text('utf-8')
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not UTF-8 text'
        raise UserError(f'data.tokenizer: {path}: {reason}; give "bpe" or the path of a tokenizer.json') from error
    return from_json(data, str(path))


def from_json(data: str, name: str = 'tokenizer.json') -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json; ``name`` begins the message of an error."""
    try:
        backend = tokenizers.Tokenizer.from_str(data)
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f'data.tokenizer: {name}: not a tokenizer.json ({first_line(error)})') from error
    return Tokenizer(backend, f'data.tokenizer: {name}')
