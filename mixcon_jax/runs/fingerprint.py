"""A hash of parameters that tells whether two runs ended bit for bit alike."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixcon_jax.runs.readback import PlainPath
from mixcon_jax.runs.stored import CACHE, consecutive, open_array
from mixcon_jax.trees import Tree, named_leaves

PART = 1 << 24  # elements read and hashed at once


def fingerprint(params: Tree, checkpoint: Path | None = None) -> str:
    """SHA-256, in hex, over names, types, shapes and bytes of all leaves in order of their names.

    It does not depend on how the arrays lie on devices or processes. Where several processes share them out, the first
    reads them from the checkpoint, part by part, since it cannot hold them; every process must call this.

    Args:
      params: nested dicts of arrays.
      checkpoint: folder of a checkpoint that was verified to hold them, ``workdir/checkpoints/100``; may be left out
        where no arrays are shared out over processes.
    """
    leaves = sorted(named_leaves(params).items())
    if all(not isinstance(leaf, jax.Array) or leaf.is_fully_addressable for _, leaf in leaves):
        return _digest((name, _gathered(leaf)) for name, leaf in leaves).hex()
    if checkpoint is None:
        raise ValueError('arrays of several processes: name the checkpoint that holds them')
    own = b''
    if jax.process_index() == 0:
        with PlainPath(checkpoint.parent) as plain:
            item = plain.path / checkpoint.name / 'model'
            own = _digest((name, open_array(item, f'params/{name}', CACHE)) for name, _ in leaves)
    shared = multihost_utils.broadcast_one_to_all(np.frombuffer(own or bytes(32), np.uint8))
    return np.asarray(shared).astype(np.uint8).tobytes().hex()


def _gathered(leaf: Any) -> np.ndarray:
    """An array as one in this process's memory, of which the array itself keeps no copy."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
        return np.asarray(leaf)
    whole = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        whole[shard.index] = np.asarray(shard.data)
    return whole


def _digest(arrays: Iterable[tuple[str, Any]]) -> bytes:
    """Of arrays in memory, or on disk (``stored.open_array``)."""
    digest = hashlib.sha256()
    for name, array in arrays:
        kind = array.dtype if isinstance(array, np.ndarray) else array.dtype.numpy_dtype
        digest.update(f'{name} {kind.name} {tuple(array.shape)}\n'.encode())
        for box in consecutive(array.shape, PART):
            part = array[box] if isinstance(array, np.ndarray) else np.asarray(array[box].read().result())
            digest.update(np.ascontiguousarray(part.astype(kind.newbyteorder('<'), copy=False)).tobytes())
    return digest.digest()
