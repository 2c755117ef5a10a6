"""Windows, capped scores and sinks: every form is softmax written out, in float64, with every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import platform
from kernels_pallas.attention import attention, xla
from kernels_pallas.attention.reference import More
from tests.kernels_pallas.test_attention import documents, draw

TOLERANCE = {'rtol': 1e-10, 'atol': 1e-11}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
OPTIONS = [{'window': 5}, {'logit_cap': 0.8}, {'sinks': True}, {'window': 9, 'logit_cap': 0.7, 'sinks': True}]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def with_sinks(options, heads=4):
    return {k: jnp.linspace(-1.0, 2.0, heads) if k == 'sinks' else value for k, value in options.items()}


def written_out(q, k, v, segments, window=None, logit_cap=None, sinks=None):
    """One query and head at a time."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        kv = h // (q.shape[2] // k.shape[2])
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] > 0 and (window is None or t - s < window)]
        scores = np.array([q[b, t, h] @ k[b, s, kv] / np.sqrt(q.shape[3]) for s in seen])
        scores = scores if logit_cap is None else logit_cap * np.tanh(scores / logit_cap)
        total = np.exp(scores).sum() + (0 if sinks is None else np.exp(sinks[h]))
        out[b, t, h] = sum(np.exp(score) / total * v[b, s, kv] for score, s in zip(scores, seen))
    return out


@pytest.mark.parametrize('options', [*map(slow, OPTIONS[:3]), OPTIONS[3]], ids='+'.join)
def test_the_oracle_is_softmax_written_out(options):
    qkv, segments, options = draw(1, 13, 13), documents(1, 13), with_sinks(options)
    got = attention(*qkv, segment_ids=segments, implementation='reference', **options)
    np.testing.assert_allclose(got, written_out(*qkv, np.asarray(segments), **options), **TOLERANCE)


@pytest.mark.parametrize(
    'options, packed', [(OPTIONS[0], False), slow(OPTIONS[1], True), slow(OPTIONS[2], False), (OPTIONS[3], True)]
)
def test_blocks_equal_the_oracle(options, packed):
    """Outputs and gradients, sinks included."""
    qkv, options = draw(2, 41, 41), with_sinks(options)
    sinks, static = options.pop('sinks', jnp.zeros(4) - 3), options
    segments = documents(2, 41) if packed else None

    def loss(q, k, v, sinks, implementation):
        more = static | {'sinks': sinks, 'segment_ids': segments, 'block_size': 8}
        out = attention(q, k, v, implementation=implementation, **more)
        return jnp.sum(jnp.sin(out * 3)), out

    graded = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True), static_argnums=4)
    got, want = graded(*qkv, sinks, 'blockwise'), graded(*qkv, sinks, 'reference')
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), got, want)


def test_one_query_equals_the_oracle():
    options = with_sinks(OPTIONS[-1])
    q, k, v = draw(3, 1, 24)
    ids = {'segment_ids': jnp.ones((2, 1), jnp.int32), 'kv_segment_ids': jnp.ones((2, 24), jnp.int32)}
    every = lambda form: attention(q, k, v, **ids, q_offset=20, implementation=form, **options)
    one, blocks, oracle = jax.jit(lambda: [every(form) for form in ('one_query', 'blockwise', 'reference')])()
    np.testing.assert_allclose(one, oracle, **TOLERANCE)
    np.testing.assert_allclose(blocks, oracle, **TOLERANCE)


def test_tiles_outside_the_window_are_not_visited():
    """Of 16 blocks of 8 keys a window of 8 meets two each, and one at the start."""
    q = jnp.zeros((1, 128, 2, 4))
    text = str(jax.make_jaxpr(lambda q: xla.attention(q, q, q, None, None, 0, 1.0, 8, More(window=8)))(q))
    static = xla._Static(8, 16, 8, 16, 1.0, True, 8, None)
    assert xla._plan(static, None, 0).count == 2 * 16 - 1 and '31' in text
    assert xla._plan(static._replace(window=None), None, 0).count == 16 * 17 // 2


def test_libraries_kernels_refuse_them(monkeypatch):
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    qkv = [x.astype(jnp.bfloat16) for x in draw(4, 16, 16)]
    for name in ('cudnn', 'tokamax'):
        with pytest.raises(ValueError, match='no window, no cap of scores and no sinks'):
            attention(*qkv, window=4, implementation=name)
