"""The adapters to tokamax: what they give the library and make of its results, what they refuse, and when they run.

The library's kernels run on GPUs alone. In their place stands what they promise, strictly: results that they leave
undefined are nan. Where the library is installed, its own XLA forms stand there, too.
"""

import configparser
import importlib.metadata
import pathlib
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cards, cases, dispatch, platform, tokamax
from kernels_pallas.attention import attention, cudnn, reference
from kernels_pallas.attention import cases as attention_cases
from kernels_pallas.attention import tokamax as flash

ROOT = pathlib.Path(__file__).resolve().parents[2]


# --------------------------------------------------------------------------------------------- in the library's place
def by_first_key(q, k, v, start, scale):
    """Causal attention from a first key on, over whole tiles."""
    length = q.shape[1]
    assert length % flash.TILE == 0 and q.shape[1:2] == k.shape[1:2] == v.shape[1:2]
    assert start is None or (start.shape == (q.shape[0], length) and start.dtype == jnp.int32)
    index = jnp.arange(length)
    seen = jnp.broadcast_to(index[None, :] <= index[:, None], (q.shape[0], length, length))
    if start is not None:
        seen = seen & (index >= start[..., None])
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.where(seen[:, None], jnp.einsum('bthd,bshd->bhts', q, k) * scale, -jnp.inf)
    return jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores, -1), v)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(flash, '_flash', by_first_key)


def equal(actual, expected, arrays):
    """Outputs and gradients of two functions of the same arrays."""

    def graded(function):
        output, pull = jax.vjp(function, *arrays)
        return output, pull(jax.random.normal(jax.random.key(3), output.shape, output.dtype))

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)
    jax.tree.map(close, graded(actual), graded(expected))


@pytest.mark.parametrize(
    'length', [1, pytest.param(7, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow), 200]
)
@pytest.mark.parametrize('packed', [False, True])
def test_attention_equals_dense_for_all_lengths_documents_and_padding(stand_in, length, packed):
    """Padding ahead of, between and behind documents, and a row of nothing else: zero, with zero gradients."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(length)
        q, k, v = (jnp.asarray(rng.normal(size=(3, length, heads, 8))) for heads in (4, 2, 2))
        ids = None
        if packed:
            ids = 1 + np.cumsum(rng.random((3, length)) < 0.1, 1)
            ids[0, : length // 9], ids[1, length - length // 4 :], ids[2] = 0, 0, 0
            ids[1, length // 3 : length // 2] = 0
            ids[1, length // 2 :] += ids[1, length // 2 :] > 0  # what follows padding is another document
            ids = jnp.asarray(ids, jnp.int32)
        dense = lambda q, k, v: reference.attention(q, k, v, ids, ids, 0, 0.3)
        equal(lambda q, k, v: flash.attention(q, k, v, ids, 0.3), dense, (q, k, v))


def test_the_first_key_of_each_query():
    ids = jnp.asarray([[0, 0, 4, 4, 4, 0, 9, 9], [1] * 8, [2, 1, 1, 3, 3, 3, 0, 0]], jnp.int32)
    expected = [[0, 1, 2, 2, 2, 5, 6, 6], [0] * 8, [0, 1, 1, 3, 3, 3, 6, 7]]
    np.testing.assert_array_equal(flash.first_keys(ids), expected)


SMALL = [
    case
    for case in attention_cases.CASES
    if sum(x.size for x in jax.eval_shape(case.draw).values()) < 2_000_000 and not case.variant.startswith('cudnn')
]


@pytest.mark.parametrize('case', SMALL, ids=lambda case: f'{case.variant} {case.name}')
def test_the_librarys_own_xla_form_takes_the_same_masks(case, monkeypatch):
    """Every verification case that a CPU can run, against float64 within the tolerance of the cards."""
    pytest.importorskip('tokamax', reason='tokamax, of the extra "gpu", is not installed')
    from tokamax._src.ops.attention import api, base

    def by_xla(q, k, v, start, scale):
        mask = base.Mask(is_causal=True, k_start=None if start is None else start[:, None, :])
        return api.IMPLEMENTATIONS['xla'](q, k, v, mask=mask, logits_scale=scale)

    monkeypatch.setattr(flash, '_flash', by_xla)
    cases.check(case)


def test_the_librarys_residuals_are_those_that_our_gradient_takes(monkeypatch):
    """The largest scaled score of each query and the sum of the others' exponentials, of base e, [B, H, T]."""
    pytest.importorskip('tokamax', reason='tokamax, of the extra "gpu", is not installed')
    from tokamax._src.ops.attention import api
    from tokamax._src.ops.attention import pallas_mosaic_gpu as library

    seen = []

    def construct(config):
        seen.append(config)
        return api.IMPLEMENTATIONS['xla']

    monkeypatch.setattr(library, 'PallasMosaicGpuFlashAttention', construct)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 128, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    ids = 1 + np.cumsum(rng.random((2, 128)) < 0.1, 1)
    for start in (None, flash.first_keys(jnp.asarray(ids, jnp.int32))):
        out, logsumexp = flash._forward(q, k, v, start, 0.3)
        np.testing.assert_allclose(out, by_first_key(q, k, v, None if start is None else start, 0.3), atol=1e-5)
        index = jnp.arange(128)
        visible = (index <= index[:, None]) & (index >= (0 if start is None else start[:, None, :, None]))
        scores = jnp.einsum('bthd,bshd->bhts', q, jnp.repeat(k, 2, axis=2)) * 0.3
        expected = jax.nn.logsumexp(jnp.where(visible, scores, -jnp.inf), -1)
        np.testing.assert_allclose(logsumexp, expected, rtol=1e-5, atol=1e-5)
    assert {(config.block_q, config.block_kv) for config in seen} == {(64, 128)}


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """An H100 with the library, without any card."""
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    monkeypatch.setattr(platform, 'compute_capability', lambda: (9, 0))
    monkeypatch.setattr(platform, 'device', lambda: types.SimpleNamespace(device_kind='NVIDIA H100'))
    monkeypatch.setattr(tokamax, '_missing', lambda module: None)
    monkeypatch.delenv(cards.TRUST, raising=False)
    monkeypatch.setenv(cards.FOLDER, str(tmp_path))
    monkeypatch.setattr(cards, 'shipped', lambda kernel: [])
    dispatch.warn_once.cache_clear()
    cards.forget()
    yield
    cards.forget()


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_refusals_of_attention(hopper, monkeypatch):
    q, k = shape(2, 96, 4, 64), shape(2, 96, 2, 64)
    refused = lambda q=q, k=k, v=None, own=False, offset=0: flash.unsupported(q, k, k if v is None else v, own, offset)
    assert refused() is None and refused(shape(2, 97, 4, 128), shape(2, 97, 4, 128)) is None
    other = 'a sequence that attends to itself from its start'
    assert other in refused(own=True) and other in refused(offset=3) and other in refused(offset=jnp.int32(0))
    assert other in refused(k=shape(2, 200, 2, 64))
    assert refused(q=shape(2, 96, 4, 64, dtype=jnp.float32)) == 'it takes bfloat16, q is float32'
    assert refused(v=shape(2, 96, 2, 64, dtype=jnp.float16)) == 'it takes bfloat16, v is float16'
    assert 'heads of width 64 or 128, these have 32' in refused(shape(2, 96, 4, 32), shape(2, 96, 2, 32))
    for sizes in ((64, 65536, 32, 64), (2**12, 129, 32, 64)):  # the second as it is padded
        assert 'indices of 32 bits cannot count' in refused(shape(*sizes), shape(*sizes))
    assert refused(shape(2**12, 128, 32, 64), shape(2**12, 128, 32, 64)) is None
    monkeypatch.setattr(platform, 'compute_capability', lambda: (8, 0))
    assert refused() == 'it is for GPUs of compute capability 9.x, this one has 8.0'
    monkeypatch.setattr(platform, 'compute_capability', lambda: None)
    assert refused() == 'it needs an NVIDIA GPU'


def test_no_case_is_refused_where_it_is_to_run(hopper, monkeypatch):
    monkeypatch.setattr(cudnn, '_missing', lambda: None)
    for case in attention_cases.CASES:
        assert case.refusal() is None, case.name
        arrays = jax.eval_shape(case.draw)
        assert jax.eval_shape(case.oracle, arrays)[0].dtype == jnp.bfloat16


def test_one_version_of_the_library_exactly(monkeypatch):
    monkeypatch.setattr(platform, 'compute_capability', lambda: (9, 0))

    def installed(version):
        tokamax._missing.cache_clear()
        monkeypatch.setattr(importlib.metadata, 'version', version)
        return tokamax.unavailable('tokamax.no_such_module')

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    assert installed(absent) == 'tokamax is not installed; the extra "gpu" has it'
    assert installed(lambda name: '9.9') == f'it is written for tokamax {tokamax.VERSION}, 9.9 is installed'
    assert installed(lambda name: tokamax.VERSION).startswith('tokamax cannot be imported: No module named')
    tokamax._missing.cache_clear()
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / 'setup.cfg')
    assert f'tokamax=={tokamax.VERSION}' in metadata['options.extras_require']['gpu'].split()
    assert f'\ntokamax=={tokamax.VERSION} ' in (ROOT / 'requirements-gpu.lock').read_text()


# ------------------------------------------------------------------------------------------------------ when it runs
def card(kernel, variant):
    return cards.Card(
        kernel, variant, cards.VERIFIED, 'NVIDIA H100', '9.0', '580.1', jax.__version__, '', '2026-11-26',
        cards.source_hash(kernel), 'test',
    )  # fmt: skip


def test_only_what_a_card_covers_runs_unasked(hopper, stand_in, monkeypatch):
    """Heads of 64 in packed rows have a card here; whole rows do not."""
    ran = []
    monkeypatch.setattr(flash, 'attention', lambda *a: ran.append(a) or a[0])
    q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    ids = jnp.ones((1, 8), jnp.int32)
    with pytest.warns(
        UserWarning, match=r"'blockwise' in place of 'tokamax': no GPU of compute capability 9.x has ver"
    ):
        attention(q, q, q, segment_ids=ids)
    assert not ran
    monkeypatch.setattr(cards, 'shipped', lambda kernel: [card(kernel, 'packed64')])
    cards.forget()
    attention(q, q, q, segment_ids=ids)
    assert len(ran) == 1
    with pytest.warns(UserWarning, match=r'attention \(causal64\)'):
        attention(q, q, q)
    attention(q, q, q, implementation='tokamax')
    assert len(ran) == 2
    dispatch.warn_once.cache_clear()
    with warnings.catch_warnings():  # a cache, and one query: nothing that the library would be for
        warnings.simplefilter('error')
        attention(q, q, q, segment_ids=ids, kv_segment_ids=ids)
        attention(q[:, :1], q, q, q_offset=3)
    with pytest.warns(UserWarning, match='it takes bfloat16, q is float32'):
        attention(*(q.astype(jnp.float32),) * 3)
    assert len(ran) == 2


def test_a_card_covers_one_version(tmp_path, monkeypatch):
    """The version is a line of code, and so in the hash."""
    import shutil

    folder = tmp_path / 'kernels_pallas'
    shutil.copytree(cards.PACKAGE, folder, ignore=shutil.ignore_patterns('__pycache__'))
    before = {kernel: cards.source_hash(kernel) for kernel in cards.kernels()}
    monkeypatch.setattr(cards, 'PACKAGE', folder)
    path = folder / 'tokamax.py'
    path.write_text(path.read_text().replace(tokamax.VERSION, '0.0.99'))
    cards.forget()
    changed = {kernel for kernel, found in before.items() if cards.source_hash(kernel) != found}
    monkeypatch.undo()
    cards.forget()
    assert changed == {'attention'}


def test_every_variant_has_its_cases():
    found = {case.variant for case in attention_cases.CASES if not case.variant.startswith('cudnn')}
    assert found == {f'{kind}{width}' for kind in ('causal', 'packed') for width in flash.WIDTHS}
    for case in attention_cases.CASES:
        assert not case.small and 'NVIDIA' in case.refusal()
