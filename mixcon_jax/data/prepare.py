"""Text to token stores: once for each source, tokenizer and split, then found again by fingerprint."""

import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tokenizers
from jaxtyping import Int

from mixcon_jax.data import tokenizer as tokenizer_lib
from mixcon_jax.data.disk import explained, locked, sync, sync_tree
from mixcon_jax.data.documents import Placed, Split
from mixcon_jax.data.sources import Source, open_source
from mixcon_jax.data.store import VERSION, StoreWriter, TokenStore, read_file, read_metadata
from mixcon_jax.data.tokenizer import Tokenizer
from mixcon_jax.errors import UserError
from mixcon_jax.paths import expand, expand_folder

BATCH_BYTES = 4 << 20  # text encoded at once
BATCH_DOCUMENTS = 8192
GZIP_LIMIT = 256 << 20  # bytes of held-out text that the gzip baseline compresses
PROGRESS_SECONDS = 2.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class PreparedStore:
    """A token store that is ready.

    Attributes:
      path: Its folder or URL.
      spec: The source it came from.
    """

    path: str
    spec: str

    @property
    def tokenizer(self) -> str:
        """Path of the store's tokenizer.json."""
        return f'{self.path.rstrip("/")}/tokenizer.json'

    @property
    def metadata(self) -> dict[str, Any]:
        return read_metadata(self.path)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, the documents' bounds and the split: equal stores give equal batches."""
        metadata = self.metadata
        return _key(metadata['sha256'], metadata['tokenizer'], metadata['eot_id'])

    def open(self, split: str) -> TokenStore:
        """Opens split 'train' or 'heldout'."""
        return TokenStore.open(self.path, split)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store.

        Raises:
          UserError: It is not the one that the store's metadata names.
        """
        tokenizer = tokenizer_lib.from_json(read_file(self.path, 'tokenizer.json'), self.tokenizer)
        require_tokenizer([self], tokenizer, self.tokenizer)
        return tokenizer


def require_tokenizer(stores: Sequence[PreparedStore], tokenizer: Tokenizer, name: str) -> None:
    """Checks that stores were made by ``tokenizer``; ``name`` says in the error where it came from.

    Raises:
      UserError: A store was made by another one.
    """
    for store in stores:
        found = store.metadata['tokenizer']
        if found != tokenizer.fingerprint:
            raise UserError(
                f'{store.path}: made by another tokenizer ({found[:12]}) than {name} ({tokenizer.fingerprint[:12]}); '
                f'use {store.tokenizer} or prepare the text again'
            )


def prepare(data: ml_collections.ConfigDict, progress: bool | Say = True) -> list[PreparedStore]:
    """Makes a token store of every source in ``data.sources``, all with one tokenizer, or finds those made before.

    Stores lie in ``data.cache_dir`` under names that contain a fingerprint of the source, the tokenizer and the split.
    A store is written beside its place and renamed into it when complete and synced to disk; an interrupted preparation
    leaves nothing that counts as a store, and the next one removes its leftovers and begins that source again (the
    tokenizer and finished sources are kept). Processes that prepare the same store wait for the first.

    Args:
      data: ``config.data``.
      progress: Print lines on what happens to stderr; or a function that takes them.

    Returns:
      The stores, in the order of ``data.sources``.

    Raises:
      UserError: The text, the tokenizer or the disk does not allow it; nothing half-written is left.
    """
    say = progress if callable(progress) else (_print if progress else lambda line: None)
    cache = expand_folder(data.cache_dir, 'data.cache_dir')
    sources: list[Source | PreparedStore] = []
    for spec in data.sources:
        if spec.startswith('store:') and spec != 'store:':
            sources.append(PreparedStore(expand(spec.removeprefix('store:')), spec))
        else:
            sources.append(open_source(spec, data.text_field))
    texts = [source for source in sources if not isinstance(source, PreparedStore)]
    made = [source for source in sources if isinstance(source, PreparedStore)]
    with explained(cache):
        cache.mkdir(parents=True, exist_ok=True)
        if data.tokenizer != 'bpe':
            tokenizer, name = tokenizer_lib.load(data.tokenizer), f"data.tokenizer '{data.tokenizer}'"
        elif made:
            tokenizer, name = made[0].load_tokenizer(), made[0].tokenizer
        else:
            tokenizer, name = _train_tokenizer(texts, data, cache, say), 'the one trained here'
        require_tokenizer(made, tokenizer, name)
        return [
            source if isinstance(source, PreparedStore) else _prepare_source(source, tokenizer, data, cache, say)
            for source in sources
        ]


def baselines(stores: Sequence[PreparedStore]) -> dict[str, float]:
    """What simple models need for the held-out text, in bits per byte of the original text.

    ``unigram``: each byte coded by its frequency in the training text, add-one smoothed. ``gzip``: gzip -9 of each
    store's held-out documents, each followed by a zero byte (the counterpart of end-of-text), of at most the first
    256 MiB.
    """
    records = [store.metadata['baselines'] for store in stores]
    train, heldout = (np.sum([record[f'{split}_bytes'] for record in records], 0) for split in ('train', 'heldout'))
    bits = -np.log2((train + 1) / (train.sum() + 256))
    return {
        'unigram': float(heldout @ bits / heldout.sum()),
        'gzip': 8 * sum(r['gzip_out'] for r in records) / sum(r['gzip_in'] for r in records),
    }


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _train_tokenizer(texts: list[Source], data: ml_collections.ConfigDict, cache: Path, say: Say) -> Tokenizer:
    """Trains one tokenizer on a sample of the training documents of all sources, or loads the one trained before."""
    size, fraction = data.tokenizer_vocab_size, data.heldout_fraction
    key = _key('bpe', 1, tokenizers.__version__, [source.fingerprint() for source in texts], size, fraction)
    path = cache / f'tokenizer-{key}.json'
    if path.exists():
        return tokenizer_lib.load(path)
    with locked(path, say):
        if path.exists():
            return tokenizer_lib.load(path)
        for leftover in cache.glob(f'.{path.name}.*.tmp'):
            leftover.unlink()
        begin, sample, taken = time.monotonic(), [], 0
        share = tokenizer_lib.SAMPLE_BYTES // len(texts)
        for number, source in enumerate(texts, 1):
            for placed in Split(source, fraction, source.spec).place(source.sample(share)):
                if not placed.heldout:
                    room = number * share - taken
                    sample.append(placed.text[:room])
                    taken += min(len(placed.data), room)
                if taken >= number * share:
                    break
        tokenizer = tokenizer_lib.train(sample, size)
        tokenizer.save(path)
        sync(cache)
        seconds = time.monotonic() - begin
        say(f'tokenizer: {tokenizer.vocab_size} tokens from {taken / 1e6:.1f} MB of text in {seconds:.1f} s')
        return tokenizer


def _prepare_source(
    source: Source, tokenizer: Tokenizer, data: ml_collections.ConfigDict, cache: Path, say: Say
) -> PreparedStore:
    fingerprint = source.fingerprint()
    key = _key('store', VERSION, fingerprint, tokenizer.fingerprint, data.heldout_fraction)
    path = cache / f'{source.slug}-{key}'
    prepared = PreparedStore(str(path), source.spec)
    if not path.exists():
        with locked(path, say):
            if not path.exists():
                # The lock is ours, so whatever lies here was left by a process that died.
                for leftover in cache.glob(f'{path.name}.tmp-*'):
                    shutil.rmtree(leftover)
                temporary = path.with_name(f'{path.name}.tmp-{os.getpid()}')
                try:
                    _write_store(source, fingerprint, tokenizer, data.heldout_fraction, temporary, say)
                    sync_tree(temporary)
                    os.rename(temporary, path)
                    sync(cache)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
                return prepared
    require_tokenizer([prepared], tokenizer, 'the one in use')
    counts = prepared.metadata['counts'].values()
    documents, tokens = (sum(count[name] for count in counts) for name in ('documents', 'tokens'))
    say(f'{source.spec}: already prepared, {documents:,} documents, {tokens:,} tokens in {path}')
    return prepared


def _write_store(source: Source, fingerprint: str, tokenizer: Tokenizer, fraction: float, path: Path, say: Say) -> None:
    writer = StoreWriter(path, tokenizer.dtype)
    progress, statistics = _Progress(source.spec, say), _Statistics()
    placed = Split(source, fraction, source.spec).place(source)
    # One thread reads, splits and counts the next batch while all cores encode this one.
    with ThreadPoolExecutor(1) as pool:
        batch = _take(placed)
        while batch:
            encoding = pool.submit(tokenizer.encode_batch, [document.text for document in batch])
            following = _take(placed)
            statistics.add(batch)
            for document, tokens in zip(batch, encoding.result(), strict=True):
                writer.add(tokens, len(document.data), document.heldout)
            progress.add(len(batch), sum(len(document.data) for document in batch))
            batch = following
    tokenizer.save(path / 'tokenizer.json')
    writer.finish({
        'tokenizer': tokenizer.fingerprint,
        'eot_id': tokenizer.eot_id,
        'vocab_size': tokenizer.vocab_size,
        'source': {'spec': source.spec, 'fingerprint': fingerprint},
        'heldout_fraction': fraction,
        'baselines': statistics.record(),
    })  # fmt: skip
    progress.done(writer.num_tokens)


def _take(placed: Iterator[Placed]) -> list[Placed]:
    """The next batch of documents; empty at the end."""
    batch, size = [], 0
    for document in itertools.islice(placed, BATCH_DOCUMENTS):
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_BYTES:
            break
    return batch


class _Statistics:
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


class _Progress:
    """A line every few seconds."""

    def __init__(self, spec: str, say: Say) -> None:
        self._spec, self._say = spec, say
        self._begin = self._last = time.monotonic()
        self._documents = self._bytes = 0

    def add(self, documents: int, num_bytes: int) -> None:
        self._documents, self._bytes = self._documents + documents, self._bytes + num_bytes
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
