"""Attention's gradient for Hopper in Mosaic's interpreter: right against float64, and blind to other documents.

The interpreter takes the left factor of a product from shared memory alone, where the compiled kernels have it in
registers (`mosaic_gpu._multiply`); all else runs as it is compiled: roles, loops, copies, barriers, products.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import mosaic_gpu, reference
from kernels_pallas.attention import tokamax as flash
from tests.kernels_pallas import interpreted


def documents(rng, batch, length, share=0.02):
    """Documents of any length, padding ahead of them, between them and behind, and a tile of nothing else."""
    ids = 1 + np.cumsum(rng.random((batch, length)) < share, 1)
    ids[0, :5], ids[-1, length - 70 :], ids[-1, length // 3 : length // 3 + 9] = 0, 0, 0
    ids[-1, length // 3 + 9 : length - 70] += 1  # what follows padding is another document
    return jnp.asarray(ids, jnp.int32)


def dense(q, k, v, start, scale):
    """Output and logsumexp of causal attention from a first key on."""
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    index = jnp.arange(length)
    seen = (index <= index[:, None])[None]
    if start is not None:
        seen = seen & (index >= start[..., None])
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.where(seen[:, None], jnp.einsum('bthd,bshd->bhts', q, k) * scale, -jnp.inf)
    return jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores, -1), v), jax.nn.logsumexp(scores, -1)


def draw(batch, length, heads, kv_heads, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng, [
        jnp.asarray(rng.normal(size=(batch, length, count, width)), jnp.bfloat16)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def wide(x):
    return jnp.asarray(np.asarray(x, np.float64))


def exact(q, k, v, dout, start, scale):
    with jax.enable_x64(True):
        function = functools.partial(dense, start=start, scale=scale)
        out, pull, logsumexp = jax.vjp(function, *map(wide, (q, k, v)), has_aux=True)
        gradients = [np.asarray(x) for x in pull(wide(dout))]
        return np.asarray(out), np.asarray(logsumexp, np.float32), gradients


def interpret(q, k, v, out, dout, logsumexp, start, scale, **options):
    parameters = interpreted.parameters(**options)
    out = jnp.asarray(out, jnp.bfloat16)
    return mosaic_gpu.backward(q, k, v, out, dout, jnp.asarray(logsumexp), start, scale, interpret=parameters)


# batch, tokens, heads, key heads, head width, packed
CASES = [
    (1, 256, 2, 1, 64, True),
    (1, 128, 1, 1, 128, False),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in ((2, 256, 4, 2, 64, True), (1, 256, 3, 1, 128, True), (1, 384, 3, 3, 64, False))
    ),
]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_gradients_equal_float64(case):
    """Races are looked for, too: a tile that is read before it came, or overwritten before it was read."""
    *sizes, packed = case
    rng, (q, k, v, dout) = draw(*sizes, seed=sum(sizes))
    start = flash.first_keys(documents(rng, *sizes[:2])) if packed else None
    out, logsumexp, expected = exact(q, k, v, dout, start, 0.11)
    actual = interpret(q, k, v, out, dout, logsumexp, start, 0.11)
    for name, a, b in zip('qkv', actual, expected):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= 4e-3 * np.linalg.norm(b), name


def test_what_other_documents_hold_is_not_even_read():
    """Documents of whole blocks, of which one is nan: 0 * nan is nan, masks or not."""
    _, (q, k, v, dout) = draw(1, 384, 1, 1, 64)
    ids = jnp.repeat(jnp.asarray([[1, 2, 3]], jnp.int32), 128, axis=1)
    start = flash.first_keys(ids)
    out, logsumexp, expected = exact(q, k, v, dout, start, 0.125)
    middle = np.asarray(ids[0] == 2)
    poisoned = lambda x: jnp.where(middle[None, :, None, None], jnp.nan, x).astype(x.dtype)
    q, k, v, dout = map(poisoned, (q, k, v, dout))
    actual = interpret(q, k, v, out, dout, logsumexp, start, 0.125, detect_races=False)
    for a, b in zip(actual, expected):
        a = np.asarray(a, np.float64)
        assert np.isnan(a[:, middle]).all()
        assert np.linalg.norm((a - b)[:, ~middle]) <= 4e-3 * np.linalg.norm(b)


@pytest.mark.slow  # both of its parts are tested above
def test_the_adapter_by_our_gradient(monkeypatch):
    """A length that is no whole number of tiles, padding, and the same bits twice; the forward pass is dense."""
    rng, (q, k, v, dout) = draw(1, 200, 2, 1, 64, seed=7)
    ids = documents(rng, 1, 200)
    forward = lambda q, k, v, start, scale: dense(*(x.astype(jnp.float32) for x in (q, k, v)), start, scale)
    rounded = lambda *args: (lambda out, logsumexp: (out.astype(jnp.bfloat16), logsumexp))(*forward(*args))
    backward = functools.partial(mosaic_gpu.backward, interpret=interpreted.parameters(detect_races=False))
    monkeypatch.setattr(flash, '_forward', rounded)
    monkeypatch.setattr(flash, '_backward', backward)
    out, pull = jax.vjp(lambda q, k, v: flash.attention(q, k, v, ids, 0.125), q, k, v)
    actual = (out, *pull(dout))
    for first, again in zip(actual[1:], pull(dout)):
        np.testing.assert_array_equal(first, again)
    with jax.enable_x64(True):
        expected, pull = jax.vjp(
            lambda q, k, v: reference.attention(q, k, v, ids, ids, 0, 0.125), *map(wide, (q, k, v))
        )
        expected = (expected, *pull(wide(dout)))
    padding = np.asarray(ids == 0)
    for a, b in zip(actual, expected):
        a = np.asarray(a, np.float64)
        assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b)
        assert (a[padding] == 0).all()


# ---------------------------------------------------------------------------------------------------- what is visited
@pytest.mark.parametrize('seed', range(3))
def test_the_last_query_of_each_key(seed):
    start = np.asarray(flash.first_keys(documents(np.random.default_rng(seed), 2, 128, 0.1)))
    end = np.asarray(mosaic_gpu.last_queries(jnp.asarray(start)))
    for row in range(2):
        for key in range(128):
            seen = [query for query in range(key, 128) if start[row, query] <= key]
            assert end[row, key] == seen[-1] + 1 and len(seen) == end[row, key] - key


def needed(ids, block, tile):
    """Tiles of a block of queries and a tile of keys, and the other way round, up to the last and from the first of
    those in which a query sees a key: by looking at every pair."""
    start = np.asarray(flash.first_keys(jnp.asarray(ids)))
    index = np.arange(ids.shape[1])
    seen = (index <= index[:, None]) & (index >= start[..., None])  # queries by keys
    some = lambda rows, columns: seen.reshape(
        len(ids), len(index) // rows, rows, len(index) // columns, columns
    ).any((2, 4))  # fmt: skip
    return int(some(block, tile).sum()), int(some(tile, block).sum())


@pytest.mark.parametrize('seed', range(3))
def test_every_visited_tile_holds_a_visible_key(seed):
    """But for tiles above the diagonal within a block."""
    ids = np.asarray(documents(np.random.default_rng(seed), 2, 1024, 0.005))
    start = np.asarray(flash.first_keys(jnp.asarray(ids)))
    assert mosaic_gpu.visited(start) == needed(ids, mosaic_gpu.BLOCK, mosaic_gpu.TILE)
    assert mosaic_gpu.visited(start, 128, 128) == needed(ids, 128, 128)


def test_short_documents_cost_less_than_a_quarter_of_one_long():
    """Rows of 8192 tokens in documents of 512: the forward pass' tiles are the library's, of 128 by 128."""
    ids = lambda document: 1 + np.arange(8192)[None] // document
    starts = [np.asarray(flash.first_keys(jnp.asarray(ids(document)))) for document in (512, 8192)]
    (forward, _), (forward_one, _) = (mosaic_gpu.visited(start, 128, 128) for start in starts)
    short, one = (mosaic_gpu.visited(start) for start in starts)
    products = lambda dq, dkv: 3 * dq + 4 * dkv
    print(f'forward {forward} of {forward_one} tiles, backward {products(*short)} of {products(*one)} products')
    assert one == (4160, 4160) and forward_one == 2080
    assert forward <= forward_one / 4 and products(*short) <= products(*one) / 4
    assert short == (320, 320) and forward == 160
