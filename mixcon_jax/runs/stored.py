"""Arrays of a checkpoint as they lie on disk, read part by part, so that none is ever held whole."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

Box = tuple[int | slice, ...]  # indices of a part of an array

CHUNK = 128 << 20  # bytes of the parts that an array is written, and can be read, in
CACHE = 2 << 30  # bytes of parts to keep at hand where an array is read in order of its elements, not of its parts
PIECE = 1 << 18  # elements looked at at once, so that they stay in the processor's cache


def open_array(item: Path, name: str, cache: int = 0) -> Any:
    """One array of an item, as Orbax writes them: Zarr in an OCDBT store. Reads none of its values.

    Args:
      item: the item's folder.
      name: the array's.
      cache: bytes of its parts that are kept at hand.
    """
    store = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{item}/'}, 'path': f'{name}/'}
    spec = {
        'driver': 'zarr', 'kvstore': store, 'fill_missing_data_reads': False, 'recheck_cached_data': 'open',
        'context': {'cache_pool': {'total_bytes_limit': cache}},
    }  # fmt: skip
    return ts.open(spec, open=True, read=True).result()


def chunks(array: Any) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The parts that an array was written in, each with where it begins; together all of it, each place once."""
    sizes = array.chunk_layout.read_chunk.shape or array.shape  # none of a scalar
    for start in itertools.product(*(range(0, size, step) for size, step in zip(array.shape, sizes, strict=True))):
        box = tuple(slice(at, min(at + step, size)) for at, step, size in zip(start, sizes, array.shape, strict=True))
        yield start, np.asarray(array[box].read().result())


def consecutive(shape: Sequence[int], limit: int) -> Iterator[Box]:
    """Parts of at most ``limit`` elements of an array of this shape, one after the other as its elements are."""
    axis, inner = len(shape), 1  # dimensions from `axis` on are taken whole: `inner` elements
    while axis and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if not axis:
        yield ()
        return
    step = max(1, limit // max(inner, 1))
    for before in np.ndindex(*shape[: axis - 1]):
        for start in range(0, shape[axis - 1], step):
            yield (*before, slice(start, min(start + step, shape[axis - 1])))
