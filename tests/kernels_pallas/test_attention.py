"""Attention: the other forms equal dense softmax attention, in float64, for any lengths, documents and caches."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import platform
from kernels_pallas.attention import attention, whole_tiles, xla

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

WIDTH = 8
TOLERANCE = {'rtol': 1e-11, 'atol': 1e-12}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, length, keys, heads=4, kv_heads=2, batch=2):
    rng = np.random.default_rng(seed)
    shapes = (batch, length, heads), (batch, keys, kv_heads), (batch, keys, kv_heads)
    return tuple(jnp.asarray(rng.normal(size=(*shape, WIDTH))) for shape in shapes)


def documents(seed, length, batch=2):
    """Segment ids from 1, a document every ten tokens or so, the last tokens of the first row padding."""
    rng = np.random.default_rng(seed)
    segment_ids = 1 + np.cumsum(rng.random((batch, length)) < 0.1, 1)
    segment_ids[0, length - length // 6 :] = 0
    return jnp.asarray(segment_ids, jnp.int32)


def graded(qkv, **options):
    weight = jax.random.normal(jax.random.key(7), qkv[0].shape)

    def loss(*qkv):
        out = attention(*qkv, **options)
        return jnp.vdot(weight, jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE)), actual, expected)


ALIKE = [(7, 7, 0, 16), (13, 32, 19, 16), (6, 6, 0, 1)]


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize(
    'length, keys, q_offset, block_size',
    [(1, 1, 0, 16), (64, 64, 0, 16), (41, 41, 0, 8), (5, 23, 11, 8), *(slow(*case) for case in ALIKE)],
)
def test_blockwise_equals_dense(length, keys, q_offset, block_size, packed):
    """Outputs and the gradients of q, k and v."""
    qkv = draw(length + keys, length, keys, heads=6, kv_heads=2 if packed else 6)
    options = {'q_offset': q_offset}
    if packed:
        kv_segment_ids = documents(length, keys)
        window = slice(q_offset, q_offset + length)
        options |= {'segment_ids': kv_segment_ids[:, window], 'kv_segment_ids': kv_segment_ids}
    expected = graded(qkv, implementation='reference', **options)
    assert_close(graded(qkv, implementation='blockwise', block_size=block_size, **options), expected)


@pytest.mark.parametrize('seed', range(3))
def test_reference_is_softmax_over_the_visible_keys(seed):
    """One query head at a time, its key head chosen by division; q_offset moves the queries along the keys."""
    length, keys, q_offset = 5, 9, 3
    q, k, v = map(np.asarray, draw(seed, length, keys))
    kv_segment_ids = np.asarray(documents(seed, keys))
    segment_ids = kv_segment_ids[:, q_offset : q_offset + length]
    expected = np.zeros(q.shape)
    for b in range(2):
        for t in range(length):
            seen = [s for s in range(keys) if s <= q_offset + t and kv_segment_ids[b, s] == segment_ids[b, t] > 0]
            for h in range(4) if seen else ():
                scores = np.array([q[b, t, h] @ k[b, s, h // 2] for s in seen]) / np.sqrt(WIDTH)
                weights = np.exp(scores) / np.exp(scores).sum()
                expected[b, t, h] = sum(w * v[b, s, h // 2] for w, s in zip(weights, seen))
    options = {'segment_ids': jnp.asarray(segment_ids), 'kv_segment_ids': jnp.asarray(kv_segment_ids)}
    options['q_offset'] = q_offset
    assert_close(attention(*map(jnp.asarray, (q, k, v)), implementation='reference', **options), expected)


@pytest.mark.parametrize('kv_heads', [1, 2, 6])
@pytest.mark.parametrize('packed', [False, True])
def test_one_query_equals_dense(kv_heads, packed):
    """What decoding calls, on every document and on padding; outputs and gradients."""
    q, k, v = draw(kv_heads, 19, 19, heads=6, kv_heads=kv_heads)
    segment_ids = documents(kv_heads, 19)
    for offset in (0, 7, 18):
        one = slice(offset, offset + 1)
        options = {'q_offset': offset}
        if packed:
            options |= {'segment_ids': segment_ids[:, one], 'kv_segment_ids': segment_ids}
        qkv = q[:, one], k, v
        expected = graded(qkv, implementation='reference', **options)
        assert_close(graded(qkv, implementation='one_query', **options), expected)


@pytest.mark.parametrize('sizes', [[1] * 6, [3, 1, 2], [5, 1]], ids=str)
def test_a_cache_read_at_a_traced_offset_equals_the_whole(sizes):
    """Queries in pieces against a preallocated cache, whose unwritten tail nothing may see."""
    q, k, v = draw(0, 6, 6)
    cache = [jnp.pad(x, ((0, 0), (0, 5), (0, 0), (0, 0)), constant_values=1e3) for x in (k, v)]
    step = jax.jit(lambda q, offset: attention(q, *cache, q_offset=offset, block_size=4))
    starts = np.cumsum([0, *sizes])[:-1]
    pieces = [step(q[:, start : start + size], start) for start, size in zip(starts, sizes)]
    assert_close(jnp.concatenate(pieces, 1), attention(q, k, v, implementation='reference'))


def test_packed_documents_equal_separate_ones():
    q, k, v = draw(0, 12, 12)
    segment_ids = jnp.asarray([[1] * 5 + [2] * 7] * 2)
    cut = lambda window: attention(q[:, window], k[:, window], v[:, window], implementation='reference')
    separate = jnp.concatenate([cut(slice(5)), cut(slice(5, None))], 1)
    assert_close(attention(q, k, v, segment_ids=segment_ids, block_size=4), separate)


@pytest.mark.parametrize('implementation', ['reference', 'blockwise'])
def test_padding_gives_zero_and_finite_gradients(implementation):
    qkv = draw(0, 20, 20)
    segment_ids = jnp.zeros((2, 20), jnp.int32).at[1, :9].set(1)
    (_, out), gradients = graded(qkv, segment_ids=segment_ids, implementation=implementation, block_size=8)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(out[1, 9:], 0)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    assert all(bool((g[0] == 0).all()) for g in gradients)


def test_blocks_above_the_diagonal_are_not_visited():
    """A nan in a tile that is read spoils its rows, even where it is masked: the rows before it stay finite."""
    q, k, v = draw(0, 32, 32)
    out = attention(q, k.at[:, 24:].set(jnp.nan), v.at[:, 24:].set(jnp.nan), block_size=8)
    assert bool(jnp.isfinite(out[:, :24]).all()) and bool(jnp.isnan(out[:, 24:]).all())


@pytest.fixture(params=['cpu', 'gpu'])
def on(request, monkeypatch):
    """Traced as for that platform; what runs is the CPU."""
    monkeypatch.setattr(platform, 'platform', lambda: request.param)
    return request.param


def rows(length, *sizes, batch=1):
    """Segment ids of rows of documents of these sizes over and over, the last cut off."""
    ids = np.repeat(np.arange(1, 2 + length // min(sizes)), np.resize(sizes, 1 + length // min(sizes)))
    return jnp.asarray(np.tile(ids[:length], (batch, 1)), jnp.int32)


@pytest.mark.parametrize('sizes', [(7,), (64,), (3, 40, 1)], ids=str)
def test_packed_documents_equal_dense_as_each_platform_goes_through_them(on, sizes):
    """Rows of the same documents; of others; padding ahead of, between and behind them."""
    length = 61
    same = rows(length, *sizes, batch=2)
    others = jnp.stack([same[0], 1 + jnp.arange(length, dtype=jnp.int32) // 9])
    padded = jnp.where((jnp.arange(length) < 9) | (jnp.arange(length) // 10 == 3), 0, others)
    qkv = draw(length, length, length)
    by = lambda **options: jax.jit(lambda segment_ids: graded(qkv, segment_ids=segment_ids, **options))
    dense, blockwise = by(implementation='reference'), by(implementation='blockwise', block_size=8)
    for segment_ids in (same, others, padded):
        assert_close(blockwise(segment_ids), dense(segment_ids))


def test_documents_whose_numbers_do_not_rise_see_their_own_keys():
    """Nor need a document's tokens lie side by side."""
    qkv = draw(0, 40, 40)
    segment_ids = jnp.asarray([[3] * 9 + [1] * 12 + [3] * 7 + [2] * 12, [2] * 20 + [1] * 20], jnp.int32)
    expected = graded(qkv, segment_ids=segment_ids, implementation='reference')
    assert_close(graded(qkv, segment_ids=segment_ids, implementation='blockwise', block_size=4), expected)


def tiles_of(segment_ids, block_size=None, q_offset=0):
    """How many turns the loop over tiles takes, and how many it would without documents."""
    q_steps = segment_ids.shape[1] // xla.tile_size(segment_ids.shape[1], block_size)
    q_block = segment_ids.shape[1] // q_steps
    static = xla._Static(q_block, q_steps, q_block, q_steps, 1.0, True)
    blocks = xla._split(segment_ids, q_steps, q_block)
    return int(xla._plan(static, (blocks, blocks), q_offset).count), q_steps * (q_steps + 1) // 2


def test_tiles_of_other_documents_are_not_visited_on_a_cpu():
    """Rows of 512 tokens a document cost less than a quarter of one document; of no document, nothing."""
    for sizes in ((512,), (400, 600, 512, 536)):
        visited, all_of_them = tiles_of(rows(8192, *sizes, batch=2))
        assert visited <= all_of_them / 4, sizes
    assert tiles_of(jnp.ones((1, 8192), jnp.int32)) == (528, 528)
    assert tiles_of(jnp.zeros((1, 8192), jnp.int32))[0] == 0
    q, k, v = draw(0, 32, 32)
    segment_ids = rows(32, 8, batch=2)
    out = attention(q, k.at[:, :8].set(jnp.nan), v.at[:, :8].set(jnp.nan), segment_ids=segment_ids, block_size=8)
    assert bool(jnp.isfinite(out[:, 8:]).all()) and bool(jnp.isnan(out[:, :8]).all())


def loops(length, **options):
    """The loops of a gradient, of a length that the compiler knows, a number, and of one that it does not."""
    qkv = draw(0, length, length)
    gradient = jax.grad(lambda *qkv: jnp.sum(attention(*qkv, **options)), argnums=(0, 1, 2))
    text = str(jax.make_jaxpr(gradient)(*qkv))
    conditions = re.findall(r'cond_jaxpr=\{(.*?)\}', text, re.DOTALL)
    known = [bool(re.search(r'= lt \w+ \d+:', condition)) for condition in conditions]
    assert 'scan[' not in text and len(known) == text.count('while[')
    return known.count(True), known.count(False)


def test_loops_have_lengths_that_a_gpu_knows(on):
    """Whether another turn comes, a GPU's host would have to ask it for."""
    packed = {'segment_ids': rows(64, 7, batch=2), 'block_size': 8}
    assert loops(64, block_size=8) == loops(61, block_size=8) == (2, 0)
    assert loops(64, **packed) == ((2, 0) if on == 'gpu' else (0, 2))
    assert loops(64, **packed | {'block_size': 64}) == (0, 0)
    assert loops(64, block_size=8, q_offset=jnp.int32(0)) == (0, 2)


def test_tiles_by_platform(on):
    """As large as the platform takes well, and sharing the keys evenly; a cache of whole tiles stays as it is."""
    largest = {'cpu': 256, 'gpu': 1024}[on]
    assert xla.tile_size(8192) == largest and xla.tile_size(8192, 300) == 300
    assert [xla.tile_size(n) for n in (1100, 2304)] == {'cpu': [256, 256], 'gpu': [640, 768]}[on]
    for keys in range(1, 5000, 37):
        size, whole = xla.tile_size(keys), whole_tiles(keys)
        assert size <= largest and size % 128 == 0
        assert keys <= whole < keys + size and (whole == keys or whole % size == 0)
        assert whole_tiles(whole) == whole
        assert xla.tile_size(whole) == size or whole <= size
    assert [whole_tiles(n, 16) for n in (1, 16, 17)] == [1, 16, 32]


def test_bfloat16_is_accumulated_in_float32():
    """At T = 4096: close to the same numbers in float32, and finite gradients."""
    qkv = [x.astype(jnp.bfloat16) for x in draw(0, 4096, 4096, heads=2, kv_heads=1, batch=1)]
    (_, out), gradients = graded(qkv, block_size=512)
    assert out.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in gradients)
    exact = attention(*(x.astype(jnp.float32) for x in qkv), block_size=512)
    assert jnp.abs(out.astype(jnp.float32) - exact).max() < 0.02
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


def test_memory_is_linear_in_the_length():
    def temporaries(length):
        qkv = [x.astype(jnp.float32) for x in draw(0, length, length, batch=1)]
        loss = lambda *qkv: jnp.sum(attention(*qkv, block_size=128))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*qkv).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


def test_errors_name_the_argument():
    attend = inspect.unwrap(attention)  # below the tests' own check of annotations
    q, k, v = draw(0, 3, 5)
    known = 'one_query, tokamax, cudnn, blockwise, reference'
    with pytest.raises(ValueError, match=f"no implementation 'flash'; available here: {known}"):
        attend(q, k, v, implementation='flash')
    with pytest.raises(ValueError, match=r"'one_query' takes one query a row, q has shape \(2, 3,"):
        attend(q, k, v, implementation='one_query')
    with pytest.raises(ValueError, match=r'k has shape \(2, 5, 2, 4\), expected \(2, keys >= 1, kv_heads, 8\)'):
        attend(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r'k has shape \(2, 0, 2, 8\), expected \(2, keys >= 1, kv_heads, 8\)'):
        attend(q, k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match=r'v has shape \(2, 4, 2, 8\), expected \(2, 5, 2, 8\)'):
        attend(q, k, v[:, :4])
    with pytest.raises(ValueError, match='k has 2 heads, expected a divisor of the 3 query heads'):
        attend(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match='kv_segment_ids is needed, as there are 5 keys and 3 queries'):
        attend(q, k, v, segment_ids=jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match='kv_segment_ids is given without segment_ids'):
        attend(q, k, v, kv_segment_ids=jnp.ones((2, 5), jnp.int32))


@pytest.mark.parametrize(
    'length, keys, offset, block', [(64, 256, 96, 32), (5, 100, 90, 16), (1, 64, 63, 8), (40, 40, 0, 8)]
)
def test_turns_of_a_traced_offset_are_those_that_the_loop_makes(monkeypatch, length, keys, offset, block):
    found, plan = [], xla._plan
    monkeypatch.setattr(xla, '_plan', lambda *args: found.append(plan(*args)) or found[-1])
    attention(*draw(0, length, keys), q_offset=jnp.int32(offset), block_size=block, implementation='blockwise')
    assert int(found[0].count) == xla.turns(length, keys, offset, block)
