"""How much more than the necessary the grouped product computes, and the blocks that decide it."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import platform
from kernels_pallas.grouped_matmul import tokamax as ragged
from kernels_pallas.grouped_matmul import xla

SHAPES = [(65536, 8, 768, 832), (32768, 16, 2048, 5184)]  # rows, groups, width, columns
ROUTINGS = ['even', 'nearly even', 'skewed', 'one expert', 'a row too many']


def drawn(rows, groups, routing, seed):
    """Rows of each group, all in some group."""
    rng = np.random.default_rng(seed)
    if routing == 'even':
        return np.full(groups, rows // groups)
    if routing == 'one expert':
        return np.eye(groups, dtype=int)[seed % groups] * rows
    if routing == 'a row too many':  # for three of the largest blocks; the rest is the last group's
        found = np.full(groups, 3 * (rows // (4 * groups)) + 1)
        found[-1] += rows - found.sum()
        return found
    shares = np.full(groups, 1 / groups) if routing == 'nearly even' else rng.dirichlet(np.full(groups, 0.3))
    return rng.multinomial(rows, shares)


def test_rows_of_a_block(monkeypatch):
    """As before on a CPU; on a GPU a quarter of a group's rows at most, so that no more is wasted."""
    rows = lambda m, groups, dtype=jnp.bfloat16: xla.block_rows(m, groups, jnp.dtype(dtype))
    assert [rows(m, 8) for m in (1, 100, 65536)] == [1, 100, 128]
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    assert [rows(m, 8) for m in (1, 100, 4096, 8192, 65536, 1 << 20)] == [1, 100, 128, 256, 2048, 2048]
    assert rows(65536, 8, jnp.float32) == 1024 and rows(0, 8) == 1 and rows(65536, 64) == 256


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('routing', ROUTINGS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_the_portable_form_computes_little_more_than_the_necessary(shape, routing, seed, monkeypatch):
    """Of the same rows in every product: 1.25 times on a GPU, where blocks are large, and 1.07 on a CPU, at most."""
    rows, groups, *_ = shape
    sizes = drawn(rows, groups, routing, seed)
    assert sizes.sum() == rows
    for on, most in (('cpu', 1.07), ('gpu', 1.25)):
        monkeypatch.setattr(platform, 'platform', lambda on=on: on)
        for dtype in (jnp.bfloat16, jnp.float32):
            block = xla.block_rows(rows, groups, jnp.dtype(dtype))
            plan = xla._plan(jnp.asarray(sizes, jnp.int32), rows, block)
            assert int(plan.rows[: plan.used].sum()) == rows
            assert rows <= int(plan.used) * block <= most * rows, (on, block)


def tiles_of(sizes):
    """How many tiles of rows a product by the library has: a group's first begins at a multiple of 8 rows."""
    ends = np.cumsum(sizes)
    starts = (ends - sizes) // 8 * 8
    return int(np.where(sizes > 0, -(-(ends - starts) // ragged.BLOCKS['block_m']), 0).sum())


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('routing', ROUTINGS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_the_library_computes_at_most_15_percent_more_than_the_necessary(shape, routing, seed):
    """Forward, and both gradients: each group's tiles of rows, and whole blocks of what is summed."""
    rows, groups, width, columns = shape
    sizes = drawn(rows, groups, routing, seed)
    block = ragged.BLOCKS['block_k']
    whole = lambda size: -(-size // block) * block
    ends = np.cumsum(sizes)
    summed = np.sum(whole(ends) - (ends - sizes) // block * block, where=sizes > 0)
    by_rows = tiles_of(sizes) * ragged.BLOCKS['block_m']
    products = by_rows * whole(width) * columns, by_rows * whole(columns) * width, summed * width * columns
    assert all(1 <= found / (rows * width * columns) <= 1.15 for found in map(int, products))


def test_the_tiles_of_rows_are_those_that_the_library_makes():
    pytest.importorskip('tokamax', reason='tokamax, of the extra "gpu", is not installed')
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu_common as common

    for routing in ROUTINGS:
        for rows, groups, *_ in SHAPES:
            sizes, tile = drawn(rows, groups, routing, 0), ragged.BLOCKS['block_m']
            made = common.GroupInfo.create_aligned(jnp.asarray(sizes, jnp.int32), tile, rows // tile + groups - 1)
            assert int((made.actual_size > 0).sum()) == tiles_of(sizes)
