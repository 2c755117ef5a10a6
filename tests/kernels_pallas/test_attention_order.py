"""In which order attention's gradient of keys and values takes its blocks, and what they read from memory: a model.

No kernel runs. 132 multiprocessors take block after block, as they come, and a tile of queries a turn; a cache of the
L2's size keeps what was read last. (An H100 has 50 MB in two halves, each of which serves its half of the cores.)
"""

import heapq
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import mosaic_gpu
from kernels_pallas.attention import tokamax as flash

CORES, CACHE = 132, 25 * 2**20


def ends(batch, length):
    """One past the last query of each key, for the documents of tests/benchmarks/ladder.py, a third of a row each."""
    rng = np.random.default_rng(0)
    rng.integers(0, 32768, (batch, length))  # its tokens
    starts = rng.random((batch, length)) < 3 / length
    start = flash.first_keys(jnp.asarray(1 + np.cumsum(starts, 1), jnp.int32))
    return np.asarray(mosaic_gpu.last_queries(start))


def tiles(end, row, block):
    """Tiles of queries that a block of keys goes through: the first, and one past the last."""
    last = end[row, (block + 1) * mosaic_gpu.BLOCK - 1]
    return block * mosaic_gpu.GROUPS, -(-int(last) // mosaic_gpu.TILE)


def turns(end, places, shared):
    """Turns until the last core is done, and what they would be if all were done at a time."""
    work = [(stop - first) * shared for first, stop in (tiles(end, row, block) for row, _, block in places)]
    cores = [0] * CORES
    for turns in work:
        heapq.heappush(cores, heapq.heappop(cores) + turns)
    return max(cores), sum(work) / CORES


def read(end, places, shared, width, by_head):
    """Bytes of queries and dO that are read, those of them that come from memory, and those that there are.

    All query heads of a tile are read side by side, or one head after the other.
    """

    def walk(row, head, block):
        first, stop = tiles(end, row, block)
        down = range(stop - 1, first - 1, -1)
        if by_head:
            return ((row, head, one, tile) for one in range(shared) for tile in down)
        return ((row, head, one, tile) for tile in range(first, stop) for one in range(shared))

    size = 2 * 2 * mosaic_gpu.TILE * width  # q and dO, 2 bytes each
    kept, asked, missed, every = OrderedDict(), 0, 0, set()
    waiting = iter(places)
    running = [walk(*place) for place in (next(waiting) for _ in range(CORES))]
    while running:
        still = []
        for blocks in running:
            while (tile := next(blocks, None)) is None and (place := next(waiting, None)) is not None:
                blocks = walk(*place)
            if tile is None:
                continue
            still.append(blocks)
            every.add(tile)
            asked += 1
            missed += tile not in kept
            kept[tile] = None
            kept.move_to_end(tile)
            if len(kept) * size > CACHE:
                kept.popitem(last=False)
        running = still
    return asked * size, missed * size, len(every) * size


def places_of(end, kv_heads):
    batch, length = end.shape
    rows, blocks = range(batch), range(length // mosaic_gpu.BLOCK)
    plain = [(row, head, block) for row in rows for head in range(kv_heads) for block in blocks]
    ordered = [tuple(map(int, place)) for place in mosaic_gpu.order(jnp.asarray(end), batch, length, kv_heads)]
    return plain, ordered


# batch, tokens, query heads, key heads, head width
SHAPES = [(4, 4096, 16, 4, 128), (16, 2048, 12, 3, 64)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_blocks_begin_longest_first(shape):
    batch, length, heads, kv_heads, _ = shape
    end = ends(batch, length)
    plain, ordered = places_of(end, kv_heads)
    assert sorted(ordered) == plain  # each once
    (before, ideal), (after, _) = (turns(end, places, heads // kv_heads) for places in (plain, ordered))
    print(f'{shape}: {before} turns as they lie, {after} in order, {ideal:.0f} at the least')
    assert after <= 1.08 * ideal < before
    sizes = [stop - first for first, stop in (tiles(end, row, block) for row, _, block in ordered)]
    assert (np.diff([size.bit_length() for size in sizes]) <= 0).all()


def test_without_documents_the_first_blocks_are_longest():
    ordered = np.asarray(mosaic_gpu.order(None, 2, 1024, 3))
    assert len(np.unique(ordered, axis=0)) == 2 * 3 * 8
    sizes = 16 - 2 * ordered[:, 2]
    assert (np.diff([int(size).bit_length() for size in sizes]) <= 0).all()


def test_query_heads_one_after_the_other_are_read_once_or_twice():
    """Side by side, the heads that a core reads are gone from the cache when the next block's core comes to them."""
    batch, length, heads, kv_heads, width = SHAPES[0]
    end = ends(batch, length)
    plain, ordered = places_of(end, kv_heads)
    asked, beside, least = read(end, plain, heads // kv_heads, width, by_head=False)
    _, after, _ = read(end, ordered, heads // kv_heads, width, by_head=True)
    megabytes = [round(x / 1e6) for x in (asked, beside, after, least)]
    print('{} MB read, {} from memory side by side, {} one after the other, {} at the least'.format(*megabytes))
    assert after <= 2 * least and beside >= 2 * after
