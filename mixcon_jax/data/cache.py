"""The folder of prepared stores: what lies there under which name, whole or not, also when its text is gone."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
import numpy as np

from mixcon_jax.data.disk import SCRATCH
from mixcon_jax.data.documents import SPLITS, Document
from mixcon_jax.data.files import Skipped
from mixcon_jax.data.metadata import VERSION
from mixcon_jax.data.paths import NothingThereError
from mixcon_jax.data.prepared import PreparedStore, key_of
from mixcon_jax.data.sources import Source, open_source
from mixcon_jax.data.store import NotWhole, read_array, read_metadata, require_file, require_parts
from mixcon_jax.data.tokenizer import Tokenizer
from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand, expand_folder


class GoneSource:
    """A source whose text is no longer there; it is known by the fingerprint that its stores remember.

    Args:
      spec: In ``data.sources``.
      stores: That were prepared from it, the newest first; at least one.
      gone: What was found in place of the text.
      data: ``config.data``.
    """

    skipped: Skipped | None = None

    def __init__(
        self, spec: str, stores: Sequence[PreparedStore], gone: UserError, data: ml_collections.ConfigDict
    ) -> None:
        self.spec, self.stores, self._gone, self._data = spec, stores, gone, data
        self.slug = Path(stores[0].path).name.rpartition('-')[0]
        self._metadata = stores[0].metadata

    def __iter__(self) -> Iterator[Document]:
        raise self.lacks()

    def sample(self, num_bytes: int) -> Iterator[Document]:
        raise self._lacks(
            f'a tokenizer of {self._data.tokenizer_vocab_size} tokens has to learn from the text; restore it, or take'
            f' data.tokenizer={self.stores[0].tokenizer}'
        )

    def fingerprint(self) -> str:
        return self._metadata['source'].get('fingerprint')

    def lacks(self, tokenizer: Tokenizer | None = None) -> UserError:
        """The error that says why its tokens do not do, for one tokenizer or any."""
        has, wanted = self._metadata['heldout_fraction'], self._data.heldout_fraction
        if tokenizer is not None and tokenizer.fingerprint != self._metadata['tokenizer']:
            return self._lacks('they are of another data.tokenizer; restore the text, or set it back')
        if has != wanted:
            return self._lacks(
                f'they are of data.heldout_fraction {has}, not {wanted}; restore the text, or set it back'
            )
        return self._lacks('this mixture has to be split in another way; restore the text')

    def _lacks(self, reason: str) -> UserError:
        try:
            require_whole(self.stores[0])
        except UserError as damaged:
            return UserError(f'{self._gone}; and of its tokens: {damaged}')
        return UserError(f'{self._gone}; its tokens are in {self.stores[0].path}, but {reason}')

    def sides(self) -> set[bool]:
        """On which sides the hash puts its documents, as far as stores tell; True is held out."""
        for store in self.stores:
            metadata = store.metadata
            if (
                metadata['heldout_fraction'] == self._data.heldout_fraction
                and whole(store)
                and split_is_the_hash(store)
            ):
                counts = metadata['counts']
                return {bool(side) for side, split in enumerate(SPLITS) if counts[split]['documents']}
        return set()

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the size that is asked for which made one of its stores; None if none did."""
        for store in self.stores:
            if store.metadata['vocab_size'] == self._data.tokenizer_vocab_size and whole(store):
                return store.load_tokenizer()
        return None


def whole(store: PreparedStore) -> bool:
    """Whether a store is there with all of its files.

    Raises:
      UserError: The system does not let this process see.
    """
    try:
        require_whole(store)
    except NotWhole:
        return False
    return True


def require_whole(store: PreparedStore) -> None:
    """Refuses a store that is not there with all of its files.

    Raises:
      NotWhole: names what is missing.
      UserError: the system does not let this process see.
    """
    require_parts(store.path, store.metadata)
    if '://' not in store.path:
        require_file(store.path, 'tokenizer.json')


def names(
    source: Source, tokenizer: Tokenizer, data: ml_collections.ConfigDict, mixture: Sequence[str]
) -> dict[str, str]:
    """What the store of a source is called by each ``Split.kind``, and with the hash's in format 1 ('old').

    Args:
      source: Of the store.
      tokenizer: Of the store.
      data: ``config.data``.
      mixture: Fingerprints of all sources of text.
    """
    parts = (source.fingerprint(), tokenizer.fingerprint, data.heldout_fraction)
    keys = {
        'hash': key_of('store', VERSION, *parts),
        'cut': key_of('store', VERSION, *parts, list(mixture)),
        'rank': key_of('store', VERSION, *parts, list(mixture), 'rank'),
        'old': key_of('store', 1, *parts),
    }
    return {kind: f'{source.slug}-{key}' for kind, key in keys.items()}


def split_is_the_hash(store: PreparedStore) -> bool:
    """Whether the hash alone decided the split of a store, so that it is the same in every mixture.

    Format 1 does not say. Where the hash left a side empty, that side got one text (and its copies), so two sides with
    documents of different sizes show that it did not.
    """
    metadata = store.metadata
    if metadata['version'] > 1:
        return metadata.get('split') == 'hash'
    offsets, sizes, sides = (read_array(store.path, name, metadata) for name in ('offsets', 'bytes', 'split'))
    kinds = np.stack([np.diff(offsets), sizes])
    return all(len(np.unique(kinds[:, sides == side], axis=1).T) > 1 for side in range(len(SPLITS)))


def has_both_sides(stores: Sequence[PreparedStore]) -> bool:
    counts = [store.metadata['counts'] for store in stores]
    return all(any(count[split]['documents'] for count in counts) for split in SPLITS)


def require_both_sides(stores: Sequence[PreparedStore]) -> None:
    """Refuses stores that together leave nothing to train on, or nothing to score.

    Raises:
      UserError: names them.
    """
    if not has_both_sides(stores):
        counts = [store.metadata['counts'] for store in stores]
        empty = next(split for split in SPLITS if not any(count[split]['documents'] for count in counts))
        what = 'all documents are held out' if empty == 'train' else 'no document is held out'
        raise UserError(
            f'data.sources: {", ".join(store.spec for store in stores)}: {what}, so there is no {empty} text;'
            ' name other text beside it, or prepare it by itself from its text'
        )


def absolute(spec: str) -> str:
    """The pattern of a source of files from the root, whatever the working directory; of other sources the spec."""
    return os.path.abspath(expand(spec.removeprefix('files:'))) if spec.startswith('files:') else spec


def prepared_from(spec: str, data: ml_collections.ConfigDict) -> list[PreparedStore]:
    """The stores of text that was at ``spec``, with the same field of text, as it was last; the newest first."""
    found, wanted = [], (absolute(spec), data.text_field)
    for store in _stores(data):
        source = store.metadata['source']
        # Format 1 has the pattern as it was given, which says little if it was relative.
        pattern = source.get('pattern') or expand(source.get('spec', '').removeprefix('files:'))
        # Of the hub it was not noted before.
        field = source.get('text_field', '' if pattern.startswith('huggingface:') else data.text_field)
        if (pattern, field) == wanted:
            found.append(store)
    found.sort(key=lambda store: os.path.getmtime(f'{store.path}/metadata.json'), reverse=True)
    source = lambda store: store.metadata['source'].get('fingerprint')
    return [store for store in found if source(store) == source(found[0])]


def prepared_as(data: ml_collections.ConfigDict, identity: Sequence[str]) -> list[PreparedStore] | None:
    """The stores of ``data.sources`` by their own fingerprints, whatever has become of the text; None if one is gone.

    Args:
      data: ``config.data``.
      identity: ``PreparedStore.fingerprint`` of each.

    Raises:
      UserError: The only one that there is cannot be read.
    """
    if len(identity) != len(data.sources):
        return None
    refusals: list[UserError] = []

    def is_it(store: PreparedStore, fingerprint: str) -> bool:
        try:
            if store.fingerprint != fingerprint:
                return False
        except UserError:  # no store, or another user's
            return False
        try:
            return whole(store)
        except UserError as error:
            refusals.append(error)
            return False

    here = list(_stores(data))
    result = []
    for spec, fingerprint in zip(data.sources, identity, strict=True):
        named = [PreparedStore(expand(spec.removeprefix('store:')), spec)] if spec.startswith('store:') else []
        if (store := next((store for store in (*named, *here) if is_it(store, fingerprint)), None)) is None:
            if refusals:
                raise refusals[0]
            return None
        result.append(PreparedStore(store.path, spec))
    return result


def changes(stores: Sequence[PreparedStore], data: ml_collections.ConfigDict) -> Iterator[str]:
    """A line on every source that is no longer what its tokens were prepared from; of the hub nothing is asked.

    Args:
      stores: Of ``prepared_as``.
      data: ``config.data``.
    """
    known = {(store.fingerprint, store.metadata['source'].get('fingerprint')) for store in _stores(data, parts=True)}
    for store in stores:
        on = f'going on with its tokens, in {store.path}'
        if store.spec.startswith('huggingface:'):
            continue
        if store.spec.startswith('store:'):
            if store.path != expand(store.spec.removeprefix('store:')):
                yield f'{store.spec}: no such store is there any more; {on}'
            continue
        try:
            now = open_source(store.spec, data.text_field, data.bad_records == 'skip').fingerprint()
        except NothingThereError:
            yield f'{store.spec}: the files are gone; {on}'
        except UserError as error:
            yield f'{error}; {on}'
        else:
            if (store.fingerprint, now) not in known:
                yield f'{store.spec}: changed since (its files, their sizes or times); {on}'


def _stores(data: ml_collections.ConfigDict, parts: bool = False) -> Iterator[PreparedStore]:
    """Stores in ``data.cache_dir``, with all parts if asked for; what cannot be read may be another user's."""
    cache = expand_folder(data.cache_dir, 'data.cache_dir')
    for folder in sorted(cache.iterdir()) if cache.is_dir() else []:
        if SCRATCH in folder.name or not os.path.exists(folder / 'metadata.json'):
            continue
        store = PreparedStore(str(folder), str(folder))
        try:
            read_metadata(store.path)
            if parts:
                require_whole(store)
        except UserError:
            continue
        yield store
