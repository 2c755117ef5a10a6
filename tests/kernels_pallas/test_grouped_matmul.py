"""How much more than the necessary the grouped product computes, the tiles that decide it, and when which form runs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cards, dispatch, platform
from kernels_pallas.grouped_matmul import cases, grouped_matmul, mosaic_gpu, xla
from kernels_pallas.grouped_matmul import tiles as rows_of

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


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('routing', ROUTINGS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_the_kernels_compute_at_most_15_percent_more_than_the_necessary(shape, routing, seed):
    """Forward, and both gradients: tiles of rows of each group, whole tiles of columns, whole parts of a sum."""
    rows, groups, width, columns = shape
    sizes = drawn(rows, groups, routing, seed)
    ends = np.cumsum(sizes)
    spans = ends - (ends - sizes) // rows_of.STEP * rows_of.STEP  # from where a group's tiles begin
    whole = lambda size, tile: -(-size // tile) * tile
    by_rows = int(rows_of.tiles(jnp.asarray(sizes), rows)['count'][0]) * rows_of.ROWS
    assert by_rows == np.sum(whole(spans, rows_of.ROWS), where=sizes > 0)
    summed = int(np.sum(whole(spans, rows_of.PART), where=sizes > 0))
    out = lambda size: whole(size, rows_of.COLUMNS)
    products = by_rows * width * out(columns), by_rows * columns * out(width), summed * out(width) * out(columns)
    found = [product / (rows * width * columns) for product in products]
    print(*(f'{ratio:.3f}' for ratio in found))
    assert all(1 <= ratio <= 1.15 for ratio in found)


@pytest.mark.parametrize(
    'rows, sizes', [(128, [128]), (152, [0, 0]), (256, [1, 0, 8, 247]), (1000, [7] * 100), (4096, [5, 4000, 0, 91])]
)
def test_every_row_is_in_one_tile_of_its_group(rows, sizes):
    """Those after the last group, too; all tiles begin at steps, and there are no more than the grid allows for."""
    found = {name: np.asarray(x) for name, x in rows_of.tiles(jnp.asarray(sizes), rows).items()}
    owner = np.full(rows, -1)
    (count,) = found['count']
    assert count <= len(found['group']) == rows_of.most_tiles(rows, len(sizes))
    for group, step, begin, end in zip(*(found[name][:count] for name in ('group', 'step', 'begin', 'end'))):
        first = step * rows_of.STEP
        mine = slice(max(first, begin), min(first + rows_of.ROWS, end))
        assert (owner[mine] == -1).all() and mine.start < mine.stop
        owner[mine] = group
    np.testing.assert_array_equal(owner, np.repeat(np.arange(len(sizes) + 1), [*sizes, rows - sum(sizes)]))


def test_no_sizes_of_groups_have_more_tiles_than_the_grid_allows_for():
    """Groups of a row more than whole tiles, behind one of a row less than a step."""
    for groups in (1, 5, 40):
        sizes = [7, *[130] * groups]
        rows = -(-sum(sizes) // 8) * 8
        assert rows_of.tiles(jnp.asarray(sizes), rows)['count'][0] <= rows_of.most_tiles(rows, len(sizes))


# ------------------------------------------------------------------------------------------------------ when it runs
@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """An H100, without any card."""
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    monkeypatch.setattr(platform, 'compute_capability', lambda: (9, 0))
    monkeypatch.setattr(platform, 'device', lambda: types.SimpleNamespace(device_kind='NVIDIA H100'))
    monkeypatch.delenv(cards.TRUST, raising=False)
    monkeypatch.setenv(cards.FOLDER, str(tmp_path))
    monkeypatch.setattr(cards, 'shipped', lambda kernel: [])
    dispatch.warn_once.cache_clear()
    cards.forget()
    yield
    cards.forget()


def test_refusals(hopper, monkeypatch):
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    refused = lambda x, w: mosaic_gpu.unsupported(shape(*x), shape(*w))
    assert refused((5, 64), (3, 64, 192)) is None and refused((2**20, 2048), (64, 2048, 2**15)) is None
    assert mosaic_gpu.unsupported(shape(5, 64), shape(3, 64, 192, dtype=jnp.float32)) == (
        'it takes bfloat16, w is float32'
    )
    for x, w in (((5, 32), (3, 32, 64)), ((5, 64), (3, 64, 100)), ((0, 64), (3, 64, 64)), ((5, 64), (0, 64, 64))):
        assert 'multiples of 64' in refused(x, w)
    for x, w in (((2**31 - 64, 64), (1, 64, 64)), ((8, 2**16), (2**15, 2**16, 64))):
        assert 'indices of 32 bits cannot count' in refused(x, w)
    for case in cases.CASES:
        assert case.refusal() is None, case.name
    monkeypatch.setattr(platform, 'compute_capability', lambda: (8, 0))
    assert 'capability 9.x, this one has 8.0' in refused((5, 64), (3, 64, 192))
    monkeypatch.setattr(platform, 'compute_capability', lambda: None)
    assert refused((5, 64), (3, 64, 192)) == 'it needs an NVIDIA GPU'


def test_it_runs_by_its_card(hopper, monkeypatch):
    ran = []
    monkeypatch.setattr(mosaic_gpu, 'grouped_matmul', lambda *a: ran.append(a) or a[0])
    arguments = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16), jnp.asarray([3, 5])
    with pytest.warns(UserWarning, match="'blocked' in place of 'mosaic_gpu'"):
        grouped_matmul(*arguments)
    assert not ran
    facts = cards.VERIFIED, 'NVIDIA H100', '9.0', '580.1', jax.__version__, '', '2026-11-26'
    card = cards.Card('grouped_matmul', 'bfloat16', *facts, cards.source_hash('grouped_matmul'), 'test')
    monkeypatch.setattr(cards, 'shipped', lambda kernel: [card])
    cards.forget()
    grouped_matmul(*arguments)
    assert len(ran) == 1
