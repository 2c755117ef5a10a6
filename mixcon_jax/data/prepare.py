"""Text to token stores: once for each source, tokenizer and split, then found again by fingerprint."""

import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ml_collections
import tokenizers

from mixcon_jax.data import cache as stores_in_cache
from mixcon_jax.data import tokenizer as tokenizer_lib
from mixcon_jax.data.background import Background
from mixcon_jax.data.cache import GoneSource
from mixcon_jax.data.disk import explained, locked, move_aside, move_into_place, scratch, sweep, sync, sync_tree
from mixcon_jax.data.documents import EmptyError, Placed, Split
from mixcon_jax.data.paths import NothingThereError
from mixcon_jax.data.prepared import PreparedStore, baselines, key_of, require_tokenizer
from mixcon_jax.data.remarks import remarks
from mixcon_jax.data.sources import Source, in_common, open_source
from mixcon_jax.data.statistics import Progress, RoundTrip, Say, Statistics
from mixcon_jax.data.store_writer import StoreWriter
from mixcon_jax.data.tokenizer import Tokenizer
from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand, expand_folder

__all__ = ['PreparedStore', 'baselines', 'prepare', 'require_tokenizer']

BATCH_BYTES = 4 << 20  # text encoded at once
BATCH_DOCUMENTS = 8192


def prepare(data: ml_collections.ConfigDict, progress: bool | Say = True) -> list[PreparedStore]:
    """Makes a token store of every source in ``data.sources``, all with one tokenizer, or finds those made before.

    Stores lie in ``data.cache_dir`` under names that contain a fingerprint of the source, the tokenizer and the split.
    A store is written beside its place and renamed into it when complete and synced to disk; an interrupted preparation
    leaves nothing that counts as a store, and the next one removes its leftovers and begins that source again (the
    tokenizer and finished sources are kept). Processes that prepare the same store wait for the first. A store that has
    lost a part is prepared again. Files that are gone are not needed where their tokens are there.

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
    sources = [_open(spec, data, say) for spec in data.sources]
    texts = [source for source in sources if not isinstance(source, PreparedStore)]
    made = [source for source in sources if isinstance(source, PreparedStore)]
    mixture = _Mixture(texts, made, data.heldout_fraction)
    if not texts:
        stores_in_cache.require_both_sides(made)
    for line in in_common(texts):
        say(line)
    with explained(cache):
        cache.mkdir(parents=True, exist_ok=True)
        if data.tokenizer != 'bpe':
            tokenizer, name = tokenizer_lib.load(data.tokenizer), f"data.tokenizer '{data.tokenizer}'"
        elif made:
            tokenizer, name = made[0].load_tokenizer(), made[0].tokenizer
        else:
            tokenizer, name = _train_tokenizer(mixture, data, cache, say), 'the one trained here'
        require_tokenizer(made, tokenizer, name)
        prepared = iter(_stores_of_texts(mixture, tokenizer, data, cache, say))
        result = [source if isinstance(source, PreparedStore) else next(prepared) for source in sources]
        stores_in_cache.require_both_sides(result)
        for remark in remarks(result):
            say(remark)
        return result


class _Mixture:
    """The sources of text, and stores made before, that are read together: one decision on the split for all."""

    def __init__(self, texts: list[Source], made: list[PreparedStore], fraction: float) -> None:
        self.texts, self.made, self.fraction = texts, made, fraction
        self.fingerprints = [source.fingerprint() for source in texts]
        self.is_one_text = len(texts) == 1 and not made

    @cached_property
    def split(self) -> Split:
        """Reads text; stores made before have the other side where the text has one only."""
        gone = [source for source in self.texts if isinstance(source, GoneSource)]
        sides = set[bool]().union(*(source.sides() for source in gone))
        # What is gone comes last: it need not be read if the others have both sides.
        texts = sorted(self.texts, key=lambda source: isinstance(source, GoneSource))
        documents = None if self.made else itertools.chain.from_iterable(texts)
        try:
            return Split(documents, self.fraction, ', '.join(source.spec for source in self.texts), sides)
        except EmptyError as error:
            raise UserError(f'{error}{_left_out(self.texts)}') from error


def _open(spec: str, data: ml_collections.ConfigDict, say: Say) -> Source | PreparedStore:
    """The source that ``spec`` names; text that is gone is stood for by the store made of it."""
    if spec.startswith('store:') and spec != 'store:':
        return PreparedStore(expand(spec.removeprefix('store:')), spec)
    try:
        return open_source(spec, data.text_field, data.bad_records == 'skip')
    except NothingThereError as error:
        stores = stores_in_cache.prepared_from(spec, data)
        if not stores:
            raise
        gone = f'{spec}: the files are gone' if spec.startswith('files:') else str(error)
        say(f'{gone}; going on with the tokens that were prepared before')
        return GoneSource(spec, stores, error, data)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _train_tokenizer(mixture: _Mixture, data: ml_collections.ConfigDict, cache: Path, say: Say) -> Tokenizer:
    """Trains one tokenizer on a sample of the training documents of all sources, or loads the one trained before."""
    size, texts = data.tokenizer_vocab_size, mixture.texts
    key = key_of('bpe', 1, tokenizers.__version__, mixture.fingerprints, size, data.heldout_fraction)
    path = cache / f'tokenizer-{key}.json'

    def trained_before() -> Tokenizer | None:
        if path.exists() and not os.access(path, os.R_OK):
            raise UserError(f'{path} cannot be read: whoever trained it must let you, or take another cache_dir')
        try:
            return tokenizer_lib.load(path) if path.exists() else None
        except UserError as error:
            say(f'{error}: training it again')
            return None

    if (found := trained_before()) is not None:
        return found
    for source in texts:
        if isinstance(source, GoneSource) and (found := source.tokenizer()) is not None:
            return found
    with locked(path, say) as alone:
        if (found := trained_before()) is not None:
            return found
        if alone:
            sweep(path)
        begin, sample, taken = time.monotonic(), [], 0
        share = tokenizer_lib.SAMPLE_BYTES // len(texts)
        for number, source in enumerate(texts, 1):
            for placed in mixture.split.place(source.sample(share)):
                if not placed.heldout:
                    room = number * share - taken
                    sample.append(placed.text[:room])
                    taken += min(len(placed.data), room)
                if taken >= number * share:
                    break
        text = f'{taken / 1e6:.1f} MB of text'
        still = lambda seconds: say(f'tokenizer: learning from {text}, {seconds:.0f} s so far')
        tokenizer = tokenizer_lib.train(sample, size, still)
        tokenizer.save(path)
        sync(cache)
        say(f'tokenizer: {tokenizer.vocab_size} tokens from {text} in {time.monotonic() - begin:.1f} s')
        return tokenizer


def _stores_of_texts(
    mixture: _Mixture, tokenizer: Tokenizer, data: ml_collections.ConfigDict, cache: Path, say: Say
) -> list[PreparedStore]:
    """Finds the stores of the mixture's texts, or makes those that are not there."""
    places: dict[str, list[PreparedStore]] = {'hash': [], 'cut': [], 'rank': []}  # where each text's may lie
    for source in mixture.texts:
        names = stores_in_cache.names(source, tokenizer, data, mixture.fingerprints)
        at = {kind: PreparedStore(str(cache / name), source.spec) for kind, name in names.items()}
        old_fits = stores_in_cache.whole(at['old']) and (
            mixture.is_one_text or stores_in_cache.split_is_the_hash(at['old'])
        )
        if old_fits and not stores_in_cache.whole(at['hash']):
            at['hash'] = at['old']
        for kind, stores in places.items():
            stores.append(at[kind])

    # How documents have to be split takes reading text, unless stores tell.
    def tells(kind: str) -> bool:
        stores = places[kind]
        if not all(map(stores_in_cache.whole, stores)):
            return False
        return kind != 'hash' or bool(mixture.made) or stores_in_cache.has_both_sides(stores)

    kind = next(filter(tells, places), None) or mixture.split.kind
    result: list[PreparedStore] = []
    for source, store in zip(mixture.texts, places[kind], strict=True):
        if any(store.path == other.path for other in result):  # named twice
            pass
        elif not stores_in_cache.whole(store):
            if isinstance(source, GoneSource):
                raise source.lacks(tokenizer)
            _prepare_source(source, mixture.split, tokenizer, data, store, say)
        else:
            require_tokenizer([store], tokenizer, 'the one in use')
            counts = store.metadata['counts'].values()
            documents, tokens = (sum(count[name] for count in counts) for name in ('documents', 'tokens'))
            skipped = store.metadata.get('skipped')
            without = f', without {skipped:,} records that cannot be used,' if skipped else ''
            say(f'{source.spec}: already prepared, {documents:,} documents, {tokens:,} tokens{without} in {store.path}')
        result.append(store)
    return result


def _prepare_source(
    source: Source, split: Split, tokenizer: Tokenizer, data: ml_collections.ConfigDict, store: PreparedStore, say: Say
) -> None:
    """Writes the store of a source, unless another process has done so meanwhile."""
    path = Path(store.path)
    with locked(path, say) as alone:
        if stores_in_cache.whole(store):
            say(f'{source.spec}: already prepared by another process, in {path}')
            return
        if path.exists():
            say(f'{path}: a part of this store is missing or cut; preparing it again')
        if alone:
            sweep(path)
        temporary = scratch(path)
        try:
            _write_store(source, split, tokenizer, data, temporary, say)
            sync_tree(temporary)
            if path.exists() and not stores_in_cache.whole(store):
                aside = move_aside(path)
                if stores_in_cache.whole(PreparedStore(str(aside), store.spec)):  # without locks: just come there
                    move_into_place(aside, path)
                shutil.rmtree(aside, ignore_errors=True)
            move_into_place(temporary, path)
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_store(
    source: Source, split: Split, tokenizer: Tokenizer, data: ml_collections.ConfigDict, path: Path, say: Say
) -> None:
    writer = StoreWriter(path, tokenizer.dtype)
    progress, statistics, round_trip = Progress(source.spec, say), Statistics(), RoundTrip(tokenizer)
    placed = split.place(source)
    batch = _take(placed)
    if not batch:
        raise UserError(f"data.sources: '{source.spec}' is empty: no document has text{_left_out([source])}")
    # A thread encodes this batch on all cores while this one reads, splits and counts.
    while batch:
        with Background(partial(round_trip.encode, batch)) as encoding:
            following = _take(placed)
            statistics.add(batch)
            for document, tokens in zip(batch, encoding.result(progress.still), strict=True):
                writer.add(tokens, len(document.data), document.heldout)
        progress.add(len(batch), sum(len(document.data) for document in batch))
        batch = following
    tokenizer.save(path / 'tokenizer.json')
    skipped = source.skipped.count if source.skipped else 0
    if skipped:
        say(f'{source.spec}: {source.skipped}')
    writer.finish({
        'tokenizer': tokenizer.fingerprint,
        'eot_id': tokenizer.eot_id,
        'vocab_size': tokenizer.vocab_size,
        'source': _described(source, data),
        'heldout_fraction': data.heldout_fraction,
        'split': split.kind,
        'skipped': skipped,
        'round_trip': round_trip.record(),
        'baselines': statistics.record(),
    })  # fmt: skip
    progress.done(writer.num_tokens)


def _left_out(sources: list[Source]) -> str:
    """What sources leave out, for the end of an error."""
    words = [f'{source.spec}: {source.skipped}' for source in sources if source.skipped and source.skipped.count]
    return f' ({"; ".join(words)})' if words else ''


def _described(source: Source, data: ml_collections.ConfigDict) -> dict[str, Any]:
    """What the store remembers of its source; of text that is gone it is found by it."""
    described = {'spec': source.spec, 'fingerprint': source.fingerprint()}
    if source.spec != 'stdlib':
        described |= {'pattern': stores_in_cache.absolute(source.spec), 'text_field': data.text_field}
    return described


def _take(placed: Iterator[Placed]) -> list[Placed]:
    """The next batch of documents; empty at the end."""
    batch, size = [], 0
    for document in itertools.islice(placed, BATCH_DOCUMENTS):
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_BYTES:
            break
    return batch
