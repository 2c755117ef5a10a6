"""What the metadata.json of a token store must hold, and a checksum of it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mixcon_jax.data.documents import SPLITS

VERSION = 2  # of the format, as it is written
READABLE = (1, 2)
ARRAYS = {'tokens': None, 'offsets': 'int64', 'bytes': 'int64', 'split': 'uint8'}

# Objects with at least these keys (...: with any), lists of this length, values of these types.
FORMAT_1: dict[Any, Any] = {
    'version': int,
    'tokenizer': str,
    'eot_id': int,
    'vocab_size': int,
    'source': {...: str},  # spec and fingerprint, where it was text
    'heldout_fraction': (int, float),
    'baselines': {'train_bytes': [int] * 256, 'heldout_bytes': [int] * 256, 'gzip_in': int, 'gzip_out': int},
    'counts': {split: {'tokens': int, 'bytes': int, 'documents': int} for split in SPLITS},
    'sha256': dict.fromkeys(ARRAYS, str),
}
FORMAT_2 = FORMAT_1 | {'files': {...: int}}
# What preparing text says besides; a store that something else has written may lack it.
SAID = {'split': str, 'skipped': int, 'round_trip': dict.fromkeys(SPLITS, (int, float))}


def complaint(metadata: Any) -> str:
    """What is wrong with the metadata of a store of a readable version, in words; empty if nothing is."""
    shape = FORMAT_1 if metadata['version'] == 1 else FORMAT_2
    wrong = _misfit(metadata, shape | {key: kind for key, kind in SAID.items() if key in metadata}, '')
    # Stores from before there was a checksum have none.
    if not wrong and 'checksum' in metadata and metadata['checksum'] != checksum(metadata):
        return 'differs from its checksum'
    return wrong


def checksum(metadata: Mapping[str, Any]) -> str:
    """sha256 of everything but the checksum itself."""
    rest = {key: value for key, value in metadata.items() if key != 'checksum'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _misfit(value: Any, shape: Any, name: str) -> str:
    """The first part of a value that its shape does not allow, in words; empty if it fits."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f'has a {type(value).__name__} as {name!r}'
        inner = dict.fromkeys(value, shape[...]) if ... in shape else shape
        missing = next((key for key in inner if key not in value), None)
        if missing is not None:
            return f'lacks {_join(name, missing)!r}'
        parts = [(value[key], inner[key], _join(name, key)) for key in inner]
    elif isinstance(shape, list):
        if not isinstance(value, list) or len(value) != len(shape):
            return f'has no list of {len(shape)} as {name!r}'
        parts = [(each, kind, name) for each, kind in zip(value, shape, strict=True)]
    else:
        fits = isinstance(value, shape) and not isinstance(value, bool)
        return '' if fits else f'has a {type(value).__name__} as {name!r}'
    return next(filter(None, (_misfit(*part) for part in parts)), '')


def _join(name: str, key: str) -> str:
    return f'{name}.{key}' if name else key
