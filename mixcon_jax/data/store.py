"""Token stores: the tokens of a corpus in TensorStore zarr3 arrays, with the bounds, bytes and split of its documents.

A store is a folder, or a URL that TensorStore reads (``gs://``, ``s3://``, ``https://``):

    metadata.json    see metadata.py: counts, checksums, sizes of the files, fingerprints of source and tokenizer
    tokenizer.json
    tokens/          uint16 or uint32 [tokens], documents end to end, without end-of-text
    offsets/         int64 [documents + 1], where each begins
    bytes/           int64 [documents], UTF-8 bytes of the original text
    split/           uint8 [documents], 0 train, 1 held out

Opening a store looks whether every file is there, with its size; ``data.integrity.verify`` reads them all. Format 1,
which is read as well, has no sizes, no measured round trip, and knows nothing about how its split was made.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int, Integer

from mixcon_jax.data.documents import SPLITS
from mixcon_jax.data.metadata import READABLE, complaint
from mixcon_jax.errors import UserError, first_line
from mixcon_jax.host import system

SHARD = 1 << 25  # tokens a file: what is held to write or to verify them, 64 or 128 MiB
MEMORY_LIMIT = 256 << 20  # bytes of tokens up to which a store is held in memory, and of cached chunks above it
REMEDY = 'restore it, or delete the folder and prepare the text again'


class NotWhole(UserError):
    """There is no token store, or it is damaged."""


def counts_of(
    offsets: Int[np.ndarray, '_'],
    num_bytes: Int[np.ndarray, 'n'],
    split: Integer[np.ndarray, 'n'],
) -> dict[str, dict[str, int]]:
    """How many tokens, bytes and documents there are of each split, as metadata.json has it."""
    sizes = {'tokens': np.diff(offsets), 'bytes': num_bytes, 'documents': np.ones_like(num_bytes)}
    return {
        name: {what: int(values[split == side].sum()) for what, values in sizes.items()}
        for side, name in enumerate(SPLITS)
    }


def _kvstore(path: str) -> Any:
    """TensorStore's description of a folder: a URL as it is, a path on the local disk otherwise.

    Raises:
      UserError: the name is not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f'{path!a}: the name of the folder is not UTF-8; token stores need one that is') from error
    return path.rstrip('/') + '/' if '://' in path else {'driver': 'file', 'path': os.path.abspath(path) + '/'}


def read_file(path: str, name: str) -> str:
    """The text of a file of a store.

    Raises:
      NotWhole: There is no such file, so ``path`` is no store.
      UserError: It cannot be read.
    """
    try:
        result = ts.KvStore.open(_kvstore(path)).result().read(name).result()
    except Exception as error:  # TensorStore maps every kind of failure of every kind of storage to some exception
        kind = UserError if system.refusal(error) else NotWhole
        raise kind(f'{path}: cannot be read ({first_line(error)})') from error
    if result.state != 'value':
        raise NotWhole(f'{path}: not a token store: it has no {name}')
    try:
        return result.value.decode()
    except UnicodeDecodeError as error:
        raise NotWhole(f'{path}: damaged token store: {name} is not UTF-8; {REMEDY}') from error


def read_metadata(path: str) -> dict[str, Any]:
    """metadata.json of a store.

    Raises:
      NotWhole: ``path`` is no store, or one of another version of the format; or it is not what was written.
      UserError: It cannot be read.
    """
    try:
        metadata = json.loads(read_file(path, 'metadata.json'))
        version = metadata['version']
    except (ValueError, KeyError, TypeError) as error:
        raise NotWhole(f'{path}: damaged token store: metadata.json is not readable; prepare it again') from error
    if version not in READABLE:
        raise NotWhole(f'{path}: token store of format {version}; this version reads {READABLE}; prepare it again')
    if words := complaint(metadata):
        raise NotWhole(f'{path}: damaged token store: metadata.json {words}; {REMEDY}')
    return metadata


def require_parts(path: str, metadata: Mapping[str, Any]) -> None:
    """Looks whether every file of a store is there, with the size that its metadata states.

    Reads no tokens. Of a store of format 1 sizes are not known; of a URL neither names nor sizes are looked up: there
    a missing part is noticed when it is read.

    Raises:
      NotWhole: names the first part that is missing or has another size.
      UserError: the system does not let this process look.
    """
    path = path.removeprefix('file://')
    if '://' in path:
        return
    sizes: Mapping[str, int | None] = metadata['files'] if metadata['version'] > 1 else _parts_of_format_1(path)
    for name, expected in sizes.items():
        size = require_file(path, name)
        if size != (size if expected is None else expected):
            raise NotWhole(f'{path}: damaged token store: {name} has {size} bytes, not {expected}; {REMEDY}')


def require_file(path: str, name: str) -> int:
    """Bytes of a file of a store.

    Raises:
      NotWhole: it is not there.
      UserError: the system does not let this process look.
    """
    try:
        return os.stat(Path(path, name)).st_size
    except OSError as error:
        raise _unread(path, name, error, 'is missing') from error


def _parts_of_format_1(path: str) -> dict[str, int | None]:
    """Names of the files of tokens; the other arrays are read whole and their checksums verified on opening."""
    size = _open_array(path, 'tokens').shape[0]
    shard = _open_array(path, 'tokens').chunk_layout.write_chunk.shape[0]
    return {f'tokens/c/{number}': None for number in range(-(-size // shard))}


class TokenStore:
    """The documents of one split of a store; reading is thread-safe.

    Attributes:
      path: The store's folder, or a name for a store in memory.
      starts, lengths: int64 [documents], where each document's tokens begin, and their number n.
      num_documents, num_tokens, num_bytes: Documents, their tokens without end-of-text, bytes of their original text.
      num_targets: Tokens to predict: n + 1 of each document, its tokens and end-of-text.
      eot_id, tokenizer_fingerprint: Of the tokenizer that made the tokens.
      round_trip: Share of the original bytes that decoding the tokens gives back; None if it was never measured.
    """

    def __init__(
        self,
        tokens: Any,
        starts: Int[np.ndarray, 'documents'],
        lengths: Int[np.ndarray, 'documents'],
        num_bytes: int,
        eot_id: int,
        tokenizer_fingerprint: str = '',
        path: str = 'memory',
        round_trip: float | None = None,
    ) -> None:
        self._tokens = tokens  # an array in memory, or a TensorStore
        self.starts, self.lengths, self.num_bytes = starts, lengths, num_bytes
        self.eot_id, self.tokenizer_fingerprint, self.path = eot_id, tokenizer_fingerprint, path
        self.round_trip = round_trip
        self.num_documents, self.num_tokens = int(lengths.size), int(lengths.sum())
        self.num_targets = self.num_tokens + self.num_documents

    def __repr__(self) -> str:
        return f'TokenStore({self.path!r}, documents={self.num_documents}, tokens={self.num_tokens})'

    @classmethod
    def open(cls, path: str | os.PathLike[str], split: str, memory_limit: int = MEMORY_LIMIT) -> 'TokenStore':
        """Opens a split of a store, all of whose files must be there.

        The checksums of everything that is read into memory are verified.

        Args:
          path: Folder or URL of the store.
          split: 'train' or 'heldout'.
          memory_limit: Bytes of tokens up to which the store is held in memory.

        Raises:
          UserError: ``path`` is no store, or a damaged one.
        """
        path = os.fspath(path)
        metadata = read_metadata(path)
        require_parts(path, metadata)
        side, eot_id, fingerprint = SPLITS.index(split), metadata['eot_id'], metadata['tokenizer']
        offsets, num_bytes, sides = (read_array(path, name, metadata) for name in ('offsets', 'bytes', 'split'))
        tokens = _open_array(path, 'tokens')
        if not offsets.size == num_bytes.size + 1 == sides.size + 1 or tokens.shape[0] != offsets[-1]:
            raise NotWhole(f'{path}: damaged token store: its arrays disagree in length; prepare it again')
        if tokens.shape[0] * tokens.dtype.numpy_dtype.itemsize <= memory_limit:
            tokens = read_array(path, 'tokens', metadata)
        mine = sides == side
        starts, lengths = offsets[:-1][mine], np.diff(offsets)[mine]
        share = metadata.get('round_trip', {}).get(split)
        return cls(tokens, starts, lengths, int(num_bytes[mine].sum()), eot_id, fingerprint, path, share)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Integer[np.ndarray, '_']],
        num_bytes: int,
        eot_id: int,
        fingerprint: str = '',
        round_trip: float | None = None,
    ) -> 'TokenStore':
        """A store in memory of documents given as token ids."""
        lengths = np.array([len(document) for document in documents], np.int64)
        tokens = np.concatenate([np.zeros(0, np.uint32), *documents]).astype(np.uint32)
        starts = np.cumsum(lengths) - lengths
        return cls(tokens, starts, lengths, num_bytes, eot_id, fingerprint, round_trip=round_trip)

    def read(self, start: int, stop: int) -> Integer[np.ndarray, 'n']:
        """Tokens [start, stop) of the store; documents lie at ``starts`` and are ``lengths`` long."""
        return self.read_many([start], [stop])[0]

    def read_many(
        self, starts: Sequence[int] | Int[np.ndarray, 's'], stops: Sequence[int] | Int[np.ndarray, 's']
    ) -> list[Integer[np.ndarray, '_']]:
        """``read`` of many ranges at once: all reads of a store on disk are under way before the first is awaited."""
        bounds = zip(np.asarray(starts).tolist(), np.asarray(stops).tolist(), strict=True)
        if isinstance(self._tokens, np.ndarray):
            return [self._tokens[start:stop] for start, stop in bounds]
        try:
            return [future.result() for future in [self._tokens[start:stop].read() for start, stop in bounds]]
        except Exception as error:
            raise _unread(self.path, 'tokens', error) from error


def _open_array(path: str, name: str) -> Any:
    kvstore = _kvstore(path)
    kvstore = f'{kvstore}{name}/' if isinstance(kvstore, str) else {**kvstore, 'path': f'{kvstore["path"]}{name}/'}
    context = ts.Context({'cache_pool': {'total_bytes_limit': MEMORY_LIMIT}})
    spec = {'driver': 'zarr3', 'kvstore': kvstore, 'recheck_cached_data': False}
    if name == 'tokens':  # checksums of the other arrays are verified; format 1 left out their chunks of zeros
        spec['fill_missing_data_reads'] = False
    try:
        return ts.open(spec, open=True, read=True, context=context).result()
    except Exception as error:
        raise _unread(path, name, error) from error


def read_array(path: str, name: str, metadata: Mapping[str, Any]) -> np.ndarray:
    """A whole array of a store, its checksum verified."""
    array = _open_array(path, name)
    try:
        values = array.read().result()
    except Exception as error:
        raise _unread(path, name, error) from error
    if hashlib.sha256(little_endian(values)).hexdigest() != metadata['sha256'][name]:
        raise NotWhole(f'{path}: damaged token store: {name} differs from its checksum; {REMEDY}')
    return values


def _unread(path: str, name: str, error: Exception, how: str = '') -> UserError:
    """The error of a part that could not be read: it is damaged, unless the system did not let this process read it."""
    if reason := system.refusal(error):
        return UserError(f'{path}: {name} cannot be read now ({reason}); the store may be whole: see to the disk')
    how = how or f'cannot be read ({first_line(error)})'
    return NotWhole(f'{path}: damaged token store: {name} {how}; {REMEDY}')


def little_endian(values: np.ndarray) -> bytes:
    """The bytes that a checksum is of."""
    return values.astype(values.dtype.newbyteorder('<'), copy=False).tobytes()


def hash_array(path: str, name: str) -> str:
    """sha256 of an array of a store, as its metadata states it; reads ``SHARD`` values at a time."""
    array, digest = _open_array(path, name), hashlib.sha256()
    try:
        for start in range(0, array.shape[0], SHARD):
            digest.update(little_endian(array[start : min(start + SHARD, array.shape[0])].read().result()))
    except Exception as error:
        raise _unread(path, name, error) from error
    return digest.hexdigest()
