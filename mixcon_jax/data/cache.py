"""The folder of prepared stores: what lies there under which name, whole or not, also when its text is gone."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
import numpy as np

from mixcon_jax.data.documents import SPLITS, Document
from mixcon_jax.data.files import Skipped
from mixcon_jax.data.prepared import PreparedStore, key_of
from mixcon_jax.data.sources import Source
from mixcon_jax.data.store import VERSION, read_array, require_parts
from mixcon_jax.data.tokenizer import Tokenizer
from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand, expand_folder


class GoneSource:
    """A source whose text is no longer there; it is known by the fingerprint that its store remembers."""

    skipped: Skipped | None = None

    def __init__(self, spec: str, store: PreparedStore, error: UserError) -> None:
        self.spec, self.slug = spec, Path(store.path).name.rpartition('-')[0]
        self._error = UserError(
            f'{error}; and {store.path}, prepared from it, is not whole, or of another tokenizer or split;'
            ' restore one of them'
        )
        self._fingerprint = store.metadata['source']['fingerprint']

    def __iter__(self) -> Iterator[Document]:
        raise self._error

    def sample(self, num_bytes: int) -> Iterator[Document]:
        raise self._error

    def fingerprint(self) -> str:
        return self._fingerprint


def whole(store: PreparedStore) -> bool:
    """Whether a store is there with all of its files."""
    try:
        require_parts(store.path, store.metadata)
    except UserError:
        return False
    return '://' in store.path or os.path.exists(store.tokenizer)


def names(source: Source, tokenizer: Tokenizer, data: ml_collections.ConfigDict, mixture: Sequence[str]) -> list[str]:
    """What the store of a source is called: split by the hash, cut in this mixture, and in format 1.

    Args:
      source: Of the store.
      tokenizer: Of the store.
      data: ``config.data``.
      mixture: Fingerprints of all sources of text.
    """
    parts = (source.fingerprint(), tokenizer.fingerprint, data.heldout_fraction)
    keys = key_of('store', VERSION, *parts), key_of('store', VERSION, *parts, list(mixture)), key_of('store', 1, *parts)
    return [f'{source.slug}-{key}' for key in keys]


def split_is_the_hash(store: PreparedStore) -> bool:
    """Whether the hash alone decided the split of a store, so that it is the same in every mixture.

    Format 1 does not say. Where the hash left a side empty, that side got one text (and its copies), so two sides with
    documents of different sizes show that it did not.
    """
    metadata = store.metadata
    if metadata['version'] > 1:
        return metadata['split'] == 'hash'
    offsets, sizes, sides = (read_array(store.path, name, metadata) for name in ('offsets', 'bytes', 'split'))
    kinds = np.stack([np.diff(offsets), sizes])
    return all(len(np.unique(kinds[:, sides == side], axis=1).T) > 1 for side in range(len(SPLITS)))


def has_both_sides(stores: Sequence[PreparedStore]) -> bool:
    counts = [store.metadata['counts'] for store in stores]
    return all(any(count[split]['documents'] for count in counts) for split in SPLITS)


def absolute(spec: str) -> str:
    """The pattern of a source of files from the root, to compare sources of different working directories."""
    return os.path.abspath(expand(spec.removeprefix('files:')))


def prepared_from(spec: str, data: ml_collections.ConfigDict) -> PreparedStore | None:
    """The newest store of files that were at ``spec``, with the same field of text; None if there is none."""
    found, wanted = [], (absolute(spec), data.text_field)
    for store in _stores(data):
        try:
            source = store.metadata['source']
            # Format 1 has the pattern as it was given, which says little if it was relative.
            pattern = source.get('pattern') or expand(source.get('spec', '').removeprefix('files:'))
        except (UserError, KeyError):  # another one's folder, or damaged beyond recognition
            continue
        if (pattern, source.get('text_field', data.text_field)) == wanted:
            found.append(store)
    return max(found, key=lambda store: os.path.getmtime(f'{store.path}/metadata.json'), default=None)


def prepared_as(data: ml_collections.ConfigDict, identity: Sequence[str]) -> list[PreparedStore] | None:
    """The stores of ``data.sources`` by their own fingerprints, whatever has become of the text; None if one is gone.

    Args:
      data: ``config.data``.
      identity: ``PreparedStore.fingerprint`` of each.
    """
    if len(identity) != len(data.sources):
        return None
    here = {store.fingerprint: store for store in _stores(data) if whole(store)}
    result = []
    for spec, fingerprint in zip(data.sources, identity, strict=True):
        if spec.startswith('store:'):
            store = PreparedStore(expand(spec.removeprefix('store:')), spec)
            if store.fingerprint != fingerprint:
                return None
        elif fingerprint in here:
            store = PreparedStore(here[fingerprint].path, spec)
        else:
            return None
        result.append(store)
    return result if all(whole(store) for store in result) else None


def _stores(data: ml_collections.ConfigDict) -> Iterator[PreparedStore]:
    """Stores in ``data.cache_dir``, whole or not."""
    cache = expand_folder(data.cache_dir, 'data.cache_dir')
    for folder in sorted(cache.iterdir()) if cache.is_dir() else []:
        if '.tmp-' not in folder.name and (folder / 'metadata.json').is_file():
            yield PreparedStore(str(folder), str(folder))
