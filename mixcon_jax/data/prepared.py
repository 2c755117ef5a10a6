"""Token stores that are ready, by the folder they lie in."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixcon_jax.data import tokenizer as tokenizer_lib
from mixcon_jax.data.documents import SPLITS
from mixcon_jax.data.store import TokenStore, read_file, read_metadata
from mixcon_jax.data.tokenizer import Tokenizer
from mixcon_jax.errors import UserError


def key_of(*parts: object) -> str:
    """A short name for what is prepared from ``parts``."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


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
        return key_of(metadata['sha256'], metadata['tokenizer'], metadata['eot_id'])

    def open(self, split: str) -> TokenStore:
        """Opens split 'train' or 'heldout'."""
        store = TokenStore.open(self.path, split)
        if store.round_trip is None:
            store.round_trip = self.round_trip().get(split)
        return store

    def round_trip(self) -> dict[str, float | None]:
        """The share of the bytes of each split that decoding its tokens gives back; None if that was never measured."""
        known = self.metadata.get('round_trip')
        if known is None:  # where nothing can be lost, nothing needs measuring
            return dict.fromkeys(SPLITS, 1.0 if self.load_tokenizer().lossless else None)
        return known

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
