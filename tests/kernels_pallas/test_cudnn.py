"""The adapter to cuDNN's attention: what it hands on, what it refuses, and when it runs.

cuDNN runs on GPUs alone; in its place stands JAX's own XLA form of the same function.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cards, cases, dispatch, platform
from kernels_pallas.attention import attention, cudnn, reference
from kernels_pallas.attention import cases as attention_cases


@pytest.fixture
def by_xla(monkeypatch):
    """JAX's XLA form where cuDNN would be called; yields what it was called with."""
    seen = []

    def library(*arrays, implementation, **options):
        assert implementation == 'cudnn'
        seen.append(options)
        return jax.nn.dot_product_attention(*arrays, implementation='xla', **options)

    monkeypatch.setattr(cudnn, '_library', library)
    return seen


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU with cuDNN, of any compute capability, without any card."""
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    monkeypatch.setattr(platform, 'device', lambda: types.SimpleNamespace(device_kind='NVIDIA A100'))
    monkeypatch.setattr(cudnn, '_missing', lambda: None)
    monkeypatch.delenv(cards.TRUST, raising=False)
    monkeypatch.setenv(cards.FOLDER, str(tmp_path))
    monkeypatch.setattr(cards, 'shipped', lambda kernel: [])
    dispatch.warn_once.cache_clear()
    cards.forget()
    yield lambda *capability: monkeypatch.setattr(platform, 'compute_capability', lambda: capability)
    cards.forget()


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    'length, heads, width', [(1, (2, 2), 8), pytest.param(7, (4, 1), 16, marks=pytest.mark.slow), (130, (6, 2), 24)]
)
def test_outputs_and_gradients_equal_dense(by_xla, length, heads, width):
    """Which query heads share a key head, the diagonal and the scale: all in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(length)
        q, k, v = (jnp.asarray(rng.normal(size=(2, length, count, width))) for count in (*heads, heads[1]))
        dy = jnp.asarray(rng.normal(size=q.shape))

        def graded(function):
            out, pull = jax.vjp(function, q, k, v)
            return out, pull(dy)

        ours = graded(lambda q, k, v: cudnn.attention(q, k, v, 0.3))
        dense = graded(lambda q, k, v: reference.attention(q, k, v, None, None, 0, 0.3))
        # JAX's XLA form computes its softmax in float32.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, dense)
    assert by_xla and all(options == {'is_causal': True, 'scale': 0.3} for options in by_xla)


SMALL = [
    case
    for case in attention_cases.CASES
    if case.variant.startswith('cudnn') and sum(x.size for x in jax.eval_shape(case.draw).values()) < 1_100_000
]


@pytest.mark.parametrize(
    'case', [SMALL[0], *(pytest.param(case, marks=pytest.mark.slow) for case in SMALL[1:])], ids=lambda case: case.name
)
def test_the_cases_of_the_cards(by_xla, case):
    cases.check(case)


def test_refusals(gpu, monkeypatch):
    gpu(8, 0)
    q, k = shape(2, 96, 4, 64), shape(2, 96, 2, 64)
    refused = lambda q=q, k=k, v=None, packed=False, cached=False: cudnn.unsupported(
        q, k, k if v is None else v, packed, cached
    )
    assert refused() is None
    for width in (8, 96, 128):
        assert refused(shape(2, 98, 4, width), shape(2, 98, 4, width)) is None
    assert refused(packed=True) == 'it takes rows of one document, without segment_ids'
    assert 'attends to itself from its start' in refused(cached=True)
    assert refused(v=shape(2, 96, 2, 64, dtype=jnp.float16)) == 'it takes bfloat16, v is float16'
    wide = shape(2, 96, 4, 192)
    assert refused(wide, wide) == 'it takes heads of a multiple of 8 up to 128, these have 192'
    assert 'a multiple of 8' in refused(shape(2, 96, 4, 36), shape(2, 96, 4, 36))
    odd = shape(2, 97, 4, 64)
    assert refused(odd, odd) == 'it takes an even number of tokens, these are 97'
    large = shape(64, 65536, 32, 64)
    assert 'indices of 32 bits cannot count' in refused(large, large)
    gpu(9, 0)
    assert refused(wide, wide) is None
    assert 'up to 256, these have 264' in refused(shape(2, 96, 4, 264), shape(2, 96, 4, 264))
    gpu(7, 5)
    assert refused() == 'it needs compute capability 8.0 or newer, this GPU has 7.5'
    monkeypatch.undo()
    assert refused() == 'it needs an NVIDIA GPU'


def test_without_cudnn_it_says_so(monkeypatch):
    """Here is none, whether or not JAX's plugin for CUDA is installed."""
    assert cudnn._missing().startswith('cuDNN')
    found = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr('jax._src.lib.cuda_versions', found)
    assert cudnn._missing() is None


def test_only_what_a_card_covers_runs_unasked(gpu, by_xla, monkeypatch):
    gpu(8, 0)
    q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    with pytest.warns(UserWarning, match=r"'blockwise' in place of 'cudnn': no GPU of compute capability 8.x has ver"):
        attention(q, q, q)
    assert not by_xla
    attention(q, q, q, implementation='cudnn')
    assert len(by_xla) == 1
    card = cards.Card(
        'attention', 'cudnn', cards.VERIFIED, 'NVIDIA A100', '8.0', '580.1', jax.__version__, '', '2026-11-26',
        cards.source_hash('attention', 'cudnn'), 'test',
    )  # fmt: skip
    monkeypatch.setattr(cards, 'shipped', lambda kernel: [card])
    cards.forget()
    dispatch.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"'cudnn' in place of 'tokamax': it is for GPUs of compute capability 9.x"):
        attention(q, q, q)
    assert len(by_xla) == 2
    ids = jnp.ones((1, 8), jnp.int32)
    attention(q, q, q, segment_ids=ids)
    attention(q, q, q, q_offset=jnp.int32(0))
    assert len(by_xla) == 2
    with pytest.raises(ValueError, match='cannot run here: it takes rows of one document'):
        attention(q, q, q, segment_ids=ids, implementation='cudnn')


def test_other_bits_the_second_time_are_no_card(monkeypatch):
    """cuDNN does not promise the same gradients twice: what decides is that a card asks for the same bits."""
    calls = iter(range(100))

    def wavering(q, k, v, implementation, **options):
        noise = jax.pure_callback(lambda: np.float32(0.1 * next(calls)), jax.ShapeDtypeStruct((), jnp.float32))
        out = jax.nn.dot_product_attention(q, k, v, implementation='xla', **options)
        return out * (1 + jax.lax.stop_gradient(noise)).astype(out.dtype)

    monkeypatch.setattr(cudnn, '_library', wavering)
    case = next(case for case in SMALL if case.name.startswith('2x512 heads 4/2 of 64'))
    monkeypatch.setattr(cases, 'TOLERANCE', dict.fromkeys(cases.TOLERANCE, 1.0))
    with pytest.raises(cases.Mismatch, match='the same call gave other bits'):
        cases.check(case)


def test_every_width_class_has_cases():
    found = functools.reduce(set.union, ({case.variant} for case in attention_cases.CASES))
    assert {'cudnn', 'cudnn_wide'} <= found
    assert cudnn.variants(128) == ('cudnn',) and cudnn.variants(136) == ('cudnn_wide',)
