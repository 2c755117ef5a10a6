"""Writes token stores: the arrays that store.py reads, a shard at a time, then the metadata that makes them a store."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Integer

from mixcon_jax.data.metadata import ARRAYS, VERSION, checksum
from mixcon_jax.data.store import SHARD, counts_of, little_endian

CHUNK = 1 << 15  # tokens a chunk: what reading one token costs


class StoreWriter:
    """Writes a store into a folder, document by document; it is one only after ``finish``."""

    def __init__(self, path: str | os.PathLike[str], dtype: np.dtype) -> None:
        self.path = Path(path)
        self.path.mkdir()
        self._tokens = _Appender(self.path / 'tokens', np.dtype(dtype))
        self._offsets: list[int] = [0]
        self._bytes: list[int] = []
        self._split: list[bool] = []

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def add(self, tokens: Integer[np.ndarray, 'n'], num_bytes: int, heldout: bool) -> None:
        self._tokens.append(tokens)
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._bytes.append(num_bytes)
        self._split.append(heldout)

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Writes what remains, and metadata.json with the counts and checksums; what else is in it is given."""
        self._tokens.finish()
        digests = {'tokens': self._tokens.sha256.hexdigest()}
        columns = {'offsets': self._offsets, 'bytes': self._bytes, 'split': self._split}
        for name, values in columns.items():
            appender = _Appender(self.path / name, np.dtype(ARRAYS[name]))
            appender.append(np.array(values, ARRAYS[name]))
            appender.finish()
            digests[name] = appender.sha256.hexdigest()
        counts = counts_of(*(np.array(values, ARRAYS[name]) for name, values in columns.items()))
        files = {
            path.relative_to(self.path).as_posix(): path.stat().st_size
            for path in sorted(self.path.rglob('*'))
            if path.is_file()
        }
        record = {'version': VERSION, **metadata, 'counts': counts, 'sha256': digests, 'files': files}
        record['checksum'] = checksum(record)
        (self.path / 'metadata.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


class _Appender:
    """Writes an array whose length is not known, one shard at a time."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        spec = {
            'driver': 'zarr3',
            'kvstore': {'driver': 'file', 'path': f'{path}/'},
            'metadata': _array_spec(dtype.name),
            'store_data_equal_to_fill_value': True,  # so that a chunk that is missing is missing, and not all zeros
        }
        self._array = ts.open(spec, create=True).result()
        self._dtype, self._waiting = dtype, 0
        self._parts: list[np.ndarray] = []
        self.sha256, self.size = hashlib.sha256(), 0

    def append(self, values: Integer[np.ndarray, 'n']) -> None:
        self._parts.append(np.asarray(values, self._dtype))
        self._waiting += len(values)
        while self._waiting >= SHARD:
            joined = np.concatenate(self._parts)
            self._write(joined[:SHARD])
            self._parts, self._waiting = [joined[SHARD:]], joined.size - SHARD

    def finish(self) -> None:
        if self._waiting:
            self._write(np.concatenate(self._parts))
        self._parts, self._waiting = [], 0

    def _write(self, values: Integer[np.ndarray, 'n']) -> None:
        start, self.size = self.size, self.size + values.size
        self._array = self._array.resize(exclusive_max=[self.size], expand_only=True).result()
        self._array[start : self.size].write(values).result()
        self.sha256.update(little_endian(values))


def _array_spec(dtype: str) -> dict[str, Any]:
    """Metadata of a growing zarr3 array; every chunk carries a checksum that reading verifies."""
    inner = [{'name': 'zstd', 'configuration': {'level': 1}}, {'name': 'crc32c'}]
    raw = {'name': 'bytes', 'configuration': {'endian': 'little'}} if dtype != 'uint8' else {'name': 'bytes'}
    shards = {
        'chunk_shape': [CHUNK],
        'codecs': [raw, *inner],
        'index_codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}],
    }
    return {
        'shape': [0],
        'data_type': dtype,
        'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [SHARD]}},
        'codecs': [{'name': 'sharding_indexed', 'configuration': shards}],
    }
