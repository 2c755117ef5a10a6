"""Checksums of arrays, computed where the arrays are.

A checksum is a sum over 32-bit words, so devices that hold parts of an array add up theirs: it is the same on any mesh
and process count, and nothing is gathered, or copied to the host from other devices.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Shaped, UInt32

from mixcon_jax.runs.stored import PIECE, consecutive

LANES = (0x9E3779B9, 0x85EBCA6B)  # one independent 32-bit sum each


def checksums(arrays: Mapping[str, Array]) -> dict[str, str]:
    """16 hexadecimal digits for each array; every process must call it, and waits for the arrays.

    A change within one 32-bit word always changes them; any other does but for one in 2^64.
    """
    sums = jax.device_get(
        {name: _on_host(array) if _is_near(array) else _sums(array) for name, array in arrays.items()}
    )
    shared = [name for name, array in arrays.items() if _is_near(array) and not array.is_fully_addressable]
    if shared:
        each = multihost_utils.process_allgather(np.stack([sums[name] for name in shared]))
        sums |= zip(shared, np.sum(each, 0, np.uint32), strict=True)
    return {name: _hex(lanes) for name, lanes in sums.items()}


def checksum(parts: Iterable[tuple[Sequence[int], np.ndarray]], shape: Sequence[int]) -> str:
    """``checksums`` of one array of which the host gets one part after the other, in any order.

    Args:
      parts: where each begins in the array, and its values.
      shape: of the whole array.
    """
    return _hex(sum((_of_part(part, start, shape) for start, part in parts), np.zeros(2, np.uint32)))


def _hex(lanes: UInt32[np.ndarray, '2']) -> str:
    return ''.join(f'{int(lane):08x}' for lane in lanes)


def _is_near(array: Array) -> bool:
    """Whether hosts can look at the array in place, where a program for its shape would take time and memory."""
    return all(device.platform == 'cpu' for device in array.devices())


def _on_host(array: Array) -> UInt32[np.ndarray, '2']:
    """What this process's devices add to ``_sums``, in NumPy; an array asked for whole would keep a copy of itself."""
    sums = np.zeros(2, np.uint32)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:  # each place once
            sums += _of_part(np.asarray(shard.data), [each.start or 0 for each in shard.index], array.shape)
    return sums


def _of_part(part: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> UInt32[np.ndarray, '2']:
    """What a part of an array adds to its sums, the part beginning at ``start``."""
    sums = np.zeros(2, np.uint32)
    for box in consecutive(part.shape, PIECE):
        flat = np.ascontiguousarray(part[box]).reshape(-1)
        words = flat.view(f'uint{8 * min(flat.itemsize, 4)}').astype(np.uint32)
        place: Any = np.zeros((), np.uint64)  # of every word among those of the array
        for axis, size in enumerate(shape):
            index = box[axis] if axis < len(box) else slice(0, part.shape[axis])
            index = index if isinstance(index, slice) else slice(index, index + 1)
            along = np.arange(start[axis] + index.start, start[axis] + index.stop, dtype=np.uint64)
            place = place[..., None] * np.uint64(size) + along
        if (each := words.size // max(flat.size, 1)) > 1:
            place = place[..., None] * np.uint64(each) + np.arange(each, dtype=np.uint64)
        place = place.reshape(-1).astype(np.uint32)
        sums += np.array([_mix(words ^ _mix(place + np.uint32(lane))).sum(dtype=np.uint32) for lane in LANES])
    return sums


@jax.jit
def _sums(array: Shaped[Array, '...']) -> UInt32[Array, '2']:
    """Two sums, modulo 2^32, of words each mixed with its place."""
    words = _words(array)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.stack([jnp.sum(_mix(words ^ _mix(place + jnp.uint32(lane))), dtype=jnp.uint32) for lane in LANES])


def _words(array: Shaped[Array, '...']) -> UInt32[Array, '...']:
    """The array's bits, one word for an element of up to 32 bits, two for one of 64."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = array.dtype.itemsize * 8
    word = jnp.dtype(f'uint{min(bits, 32)}')
    return jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)


def _mix[T: (Array, np.ndarray)](word: T) -> T:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain): one to one, and every bit reaches every other."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
