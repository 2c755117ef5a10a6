"""SSD's kernels for Hopper in Mosaic's interpreter: right against the sequential loop in float64, gradients too.

The interpreter takes the left factor of a product from shared memory alone, where the compiled kernels have some in
registers (`tiles.from_registers`); all else runs as it is compiled: roles, loops, copies, barriers, products. Races
with the copy engine are looked for, too.
"""

import dataclasses
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cards, cases, dispatch, platform
from kernels_pallas.ssd import cases as ours
from kernels_pallas.ssd import mosaic_gpu, ssd, xla
from tests.kernels_pallas import interpreted

slow = lambda *case: pytest.param(case, marks=pytest.mark.slow)
# batch, tokens, heads, values, groups, keys, documents' starts
CASES = [
    (1, 100, 4, 128, 2, 64, 0.03),  # groups, more units than are in flight, a chunk that is not full
    slow(2, 130, 2, 128, 2, 64, 0.2),
    slow(1, 200, 4, 64, 2, 128, 0.02),
    slow(1, 64, 1, 192, 1, 128, 0.0),
]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_outputs_states_and_gradients_equal_float64(case):
    """And are the same bits again. Head by head decays are from such as hardly forget to such as forget at once."""
    errors = cases.check(ours.case(*case), interpreted.parameters())
    assert len(errors) == 8 and max(errors.values()) < 3.5e-3, errors


@pytest.mark.slow
def test_a_document_is_what_it_is_alone():
    """Outputs and gradients, though those before it hold the largest of numbers, for which no gradient is left."""
    arrays, start = ours.draw(1, 128, 1, 64, 1, 64), 70
    grown = lambda value: value.at[:, :start].multiply(1e12)
    given = arrays | {name: grown(arrays[name]) for name in ('x', 'B')}
    reset = np.arange(128)[None] == start
    run = lambda given: ours.run(reset, 'mosaic_gpu', given, interpreted.parameters(detect_races=False))
    (y, final), pull = jax.vjp(run, given)
    dy = (arrays['x'] * (np.arange(128) >= start)[:, None, None]).astype(y.dtype)
    gradients = pull((dy, final))[0]
    with jax.enable_x64(True):
        alone = {name: jnp.asarray(np.asarray(arrays[name][:, start:], np.float64)) for name in ours.ORDER}
        alone['initial_state'] = jnp.zeros((1, 1, 64, 64))
        expected, pull = jax.vjp(lambda given: ours.run(None, 'sequential', given), alone)
        wide = lambda value: jnp.asarray(np.asarray(value, np.float64))
        wanted = pull((wide(dy[:, start:]), wide(final)))[0]
        expected, wanted = jax.tree.map(np.asarray, (expected, wanted))
    assert cases.relative(y[:, start:], expected[0]) < 4e-3 and cases.relative(final, expected[1]) < 4e-3
    assert (gradients['initial_state'] == 0).all()
    for name in ours.ORDER:
        own, before = gradients[name][:, start:], gradients[name][:, :start]
        first = int(name == 'log_decay')  # whose first token's has nothing to act on, of a state that is zero
        assert cases.relative(own[:, first:], wanted[name][:, first:]) < 4e-3, name
        # Nothing before the document has a say in it; of a sum that runs on over the chunk, rounding is left.
        assert abs(before).max() <= first * 1e-6 * abs(own).max(), name


def test_a_token_may_forget_all_there_is():
    """Log decays far beyond what float32's exponentials reach, minus infinity among them, are a reset."""
    arrays = {name: value[:, :64] for name, value in ours.draw(1, 64, 1, 64, 1, 64).items() if name != 'initial_state'}
    steep = [jnp.asarray(arrays['log_decay']).at[0, 20].set(value).astype(jnp.float32) for value in (-1e6, -jnp.inf)]
    state, none = jnp.ones((1, 1, 64, 64)), interpreted.parameters(detect_races=False)
    call = lambda decay, reset: mosaic_gpu.ssd(
        arrays['x'], decay, arrays['B'], arrays['C'], None, reset, state, none
    )  # fmt: skip
    expected = call(arrays['log_decay'].astype(jnp.float32), jnp.arange(64)[None] == 20)
    for decay in steep:
        jax.tree.map(np.testing.assert_array_equal, call(decay, None), expected)


# ------------------------------------------------------------------------------------------------------ what it takes
def shapes(batch=2, length=128, heads=4, width=64, groups=2, keys=64, dtype=jnp.bfloat16):
    shape = jax.ShapeDtypeStruct
    key = shape((batch, length, groups, keys), dtype)
    return shape((batch, length, heads, width), dtype), shape((batch, length, heads), jnp.float32), key, key


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(platform, 'compute_capability', lambda: (9, 0))


def test_it_takes_mamba2_and_retention(hopper):
    assert mosaic_gpu.unsupported(*shapes(), exclusive=False) is None
    assert mosaic_gpu.unsupported(*shapes(heads=8, width=128, groups=8, keys=64), exclusive=False) is None
    assert mosaic_gpu.unsupported(*shapes(16, 2048, 24, 64, 1, 128), exclusive=False) is None


@pytest.mark.parametrize(
    'sizes, reason',
    [
        ({'keys': 96}, 'it takes 64 or 128 keys and a multiple of 64 values a head, not 96 and 64'),
        ({'width': 96}, 'not 64 and 96'),
        ({'dtype': jnp.float32}, 'it takes bfloat16, x is float32'),
        ({'length': 63}, 'rows of at least 64 tokens, not 63'),
        ({'batch': 1 << 15, 'length': 1 << 15}, 'indices of 32 bits cannot count'),
    ],
)
def test_what_it_does_not_take(hopper, sizes, reason):
    assert reason in mosaic_gpu.unsupported(*shapes(**sizes), exclusive=False)


def test_decays_by_key_and_tokens_that_read_the_state_before_are_not_taken(hopper, monkeypatch):
    x, log_decay, B, C = shapes()
    by_key = jax.ShapeDtypeStruct((*log_decay.shape, 64), jnp.float32)
    assert 'not one a key dimension' in mosaic_gpu.unsupported(x, by_key, B, C, False)
    assert 'float64' in mosaic_gpu.unsupported(x, jax.ShapeDtypeStruct(log_decay.shape, jnp.float64), B, C, False)
    assert 'not the one before' in mosaic_gpu.unsupported(x, log_decay, B, C, True)
    monkeypatch.setattr(platform, 'compute_capability', lambda: (8, 0))
    assert 'this one has 8.0' in mosaic_gpu.unsupported(x, log_decay, B, C, False)


def test_without_a_gpu_it_is_refused_by_name_and_chunks_run():
    x, log_decay, B, C = (jnp.zeros(s.shape, s.dtype) for s in shapes(1, 64, 2))
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it needs an NVIDIA GPU"):
        ssd(x, log_decay, B, C, implementation='mosaic_gpu')
    assert ssd(x, log_decay, B, C)[0].shape == x.shape


def test_on_a_gpu_it_runs_by_default_once_that_has_verified_it(hopper, monkeypatch, tmp_path):
    """Until then chunks do, with a warning, but for calls that no kernel of ours is for."""
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    monkeypatch.setattr(platform, 'device', lambda: types.SimpleNamespace(device_kind='NVIDIA H100'))
    monkeypatch.setenv(cards.FOLDER, str(tmp_path))
    monkeypatch.delenv(cards.TRUST, raising=False)
    monkeypatch.setattr(cards, 'shipped', lambda kernel: [])
    monkeypatch.setattr(xla, 'chunked', lambda x, *rest: (jnp.zeros_like(x), rest[-3]))
    monkeypatch.setattr(mosaic_gpu, 'ssd', lambda x, *rest: (jnp.ones_like(x), rest[-1]))
    cards.forget()
    dispatch.warn_once.cache_clear()
    x, log_decay, B, C = (jnp.zeros(shape.shape, shape.dtype) for shape in shapes(1, 64, 2))
    by_kernel = lambda **options: bool(ssd(x, log_decay, B, C, **options)[0].all())
    with pytest.warns(
        UserWarning, match=r"runs 'chunked' in place of 'mosaic_gpu': no GPU .* has verified ssd \(keys64"
    ):
        assert not by_kernel()
    assert by_kernel(implementation='mosaic_gpu')
    card = cards.Card('ssd', 'keys64', cards.VERIFIED, 'NVIDIA H100', '9.0', '', jax.__version__, '', '', '', '')
    cards.write(tmp_path / 'ssd.json', [dataclasses.replace(card, sources=cards.source_hash('ssd'))])
    cards.forget()
    assert by_kernel()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not by_kernel(exclusive=True)
        assert not bool(ssd(x[:, :1], log_decay[:, :1], B[:, :1], C[:, :1])[0].any())  # a step of decoding
    cards.forget()
