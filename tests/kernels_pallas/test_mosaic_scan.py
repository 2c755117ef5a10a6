"""The GPU kernels of the selective scan, interpreted on the CPU, against the sequential loop in float64.

The interpreter detects races with the copy engine and treats a block's threads as one; barriers between them are
counted in the compiled kernels (tests/gpu).
"""

import warnings
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch, platform
from kernels_pallas.selective_scan import PADDED_DT, mosaic_gpu, selective_scan
from kernels_pallas.selective_scan.mosaic_gpu.tuning import Settings, time_splits
from tests.kernels_pallas import interpreted

SMALL = Settings(forward_tile=16, unroll=2, backward_tile=8, stretch=4)  # several tiles in few steps
TOLERANCE = {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(jnp.bfloat16): 5e-3}  # by an output's own type


@dataclass(frozen=True)
class Case:
    """Sizes and options; `shape` is B, T, D, N."""

    shape: tuple[int, int, int, int]
    dtype: type = jnp.float32
    gate: bool = False
    softplus: bool = False
    skip: bool = False
    resets: tuple[int, ...] | None = None  # tokens that start a document
    state: bool = False
    readout: bool = False
    padded: bool = False  # some tokens leave the state as it is
    slow: bool = False  # what other cases show in part, left to `make test-all`
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        on = [name for name in ('gate', 'softplus', 'skip', 'state', 'readout', 'padded') if getattr(self, name)]
        on += ['resets'] if self.resets else []
        on += [f'{key}={value}' for key, value in self.options.items() if key != 'settings']
        return f'{"x".join(map(str, self.shape))}-{jnp.dtype(self.dtype).name}-{"-".join(on) or "plain"}'


FULL = {'gate': True, 'softplus': True, 'skip': True, 'state': True}
TABLE = {'settings': None}  # the tuned tile sizes in place of the small ones
CASES = [
    # lengths
    Case((1, 1, 128, 8)),
    Case((1, 7, 128, 16), slow=True),
    Case((2, 64, 128, 8), state=True, slow=True),
    Case((1, 73, 128, 8), **FULL, resets=(0, 40, 72), slow=True),
    Case((1, 257, 128, 8), **FULL, resets=(0, 100, 256), slow=True),
    # channels and states that fill no tile
    Case((2, 7, 5, 3), **FULL),
    Case((1, 19, 200, 8), skip=True),
    Case((1, 16, 129, 16), gate=True, state=True, slow=True),
    Case((1, 9, 128, 24), **FULL, slow=True),
    Case((1, 8, 128, 32), **FULL, resets=(4,)),
    Case((1, 9, 128, 64), **FULL, resets=(4,), slow=True),
    # one option at a time
    Case((1, 24, 128, 8), gate=True, slow=True),
    Case((1, 24, 128, 8), softplus=True, slow=True),
    Case((1, 24, 128, 8), skip=True, slow=True),
    Case((1, 24, 128, 8), state=True, slow=True),
    Case((2, 24, 128, 8), softplus=True, padded=True, resets=(16,)),
    Case((1, 24, 128, 8), padded=True, state=True, slow=True),
    # documents that start on the borders of tiles, beside them, and all at once
    Case((1, 33, 128, 8), resets=(0, 8, 16, 32), state=True),
    Case((1, 33, 128, 16), **FULL, resets=(7, 9, 15, 17), slow=True),
    Case((1, 12, 128, 8), resets=tuple(range(12)), state=True, slow=True),
    # bfloat16
    Case((1, 24, 128, 16), jnp.bfloat16, slow=True),
    Case((2, 40, 128, 16), jnp.bfloat16, **FULL, resets=(16, 20), slow=True),
    Case((1, 7, 5, 8), jnp.bfloat16, **FULL, slow=True),
    # the tuned tiles
    Case((1, 64, 128, 16), jnp.bfloat16, **FULL, resets=(32,), options=TABLE),
    Case((1, 40, 128, 16), **FULL, resets=(16,), options=TABLE, slow=True),
    # time in slices, evenly and not
    Case((1, 32, 128, 8), **FULL, resets=(3, 16), options={'splits': 2}, slow=True),
    Case((1, 64, 128, 8), **FULL, resets=(3, 32), options={'splits': 4}, slow=True),
    Case((1, 37, 128, 8), **FULL, resets=(3, 16), options={'splits': 2}),
    Case((1, 32, 128, 8), jnp.bfloat16, **FULL, options={'splits': 2}, slow=True),
    # states kept less often
    Case((1, 40, 128, 8), **FULL, resets=(34,), options={'keep_every': 32}, slow=True),
    Case((2, 70, 128, 8), **FULL, resets=(40,), options={'keep_every': 32}, slow=True),
    Case((2, 100, 128, 8), softplus=True, state=True, options={'keep_every': 48}, slow=True),
    Case((2, 50, 128, 8), state=True, options={'keep_every': 16, 'settings': Settings(32, 2, 8, 4)}, slow=True),
    # the a-priori outputs
    Case((1, 24, 128, 8), softplus=True, state=True, resets=(9,), options={'prior': True}),
    Case((1, 32, 128, 8), softplus=True, state=True, options={'prior': True, 'splits': 2}, slow=True),
    # Conba's scaled readout
    Case((1, 11, 128, 16), **FULL, resets=(5,), readout=True, slow=True),
    Case((1, 8, 5, 3), readout=True, slow=True),
    Case((1, 16, 128, 16), jnp.bfloat16, **FULL, readout=True, slow=True),
    Case((1, 16, 128, 16), state=True, readout=True, options={'splits': 2}, slow=True),
]


def draw(case: Case, seed: int) -> tuple[dict, jax.Array | None]:
    """Every differentiable argument, and the reset."""
    rng = np.random.default_rng(seed)
    batch, length, channels, states = case.shape
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    tokens = lambda: normal(batch, length, channels).astype(case.dtype)
    dt = tokens() if case.softplus else jnp.abs(tokens()) * 0.3
    if case.padded:
        holes = jnp.asarray(rng.random((batch, length)) < 0.3)[..., None]
        dt = jnp.where(holes, jnp.asarray(PADDED_DT if case.softplus else 0, case.dtype), dt)
    arrays = {
        'u': tokens(), 'dt': dt, 'A': -jnp.exp(normal(channels, states) * 0.5),
        'B': normal(batch, length, states), 'C': normal(batch, length, states),
    }  # fmt: skip
    if case.skip:
        arrays['D'] = normal(channels)
    if case.softplus:
        arrays['dt_bias'] = normal(channels) - 2
    if case.gate:
        arrays['z'] = tokens()
    if case.state:
        arrays['initial_state'] = normal(batch, channels, states)
    if case.readout:
        arrays |= {'Z': normal(states, states) * 0.3, 'g': normal(states) + 1}
    if case.resets is None:
        return arrays, None
    reset = np.zeros((batch, length), bool)
    reset[0, list(case.resets)] = True
    return arrays, jnp.asarray(reset)


def kernel(case: Case, arrays: dict, reset: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    settings = SMALL if not case.readout else Settings(16, 1, 8, 2)
    options = {'settings': settings, 'splits': 1} | case.options
    return mosaic_gpu.scan(
        **arrays, dt_softplus=case.softplus, reset=reset, **options,
        generation='hopper', cores=132, interpret=interpreted.parameters(),
    )  # fmt: skip


def oracle(case: Case, arrays: dict, reset: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The sequential loop; the caller enables float64."""
    arrays = dict(arrays)
    Z, g = arrays.pop('Z', None), arrays.pop('g', None)
    prior = case.options.get('prior', False)
    out = selective_scan(
        **arrays, dt_softplus=case.softplus, reset=reset, prior=prior, implementation='reference',
        readout=None if Z is None else (Z, g, None),
    )  # fmt: skip
    return (out[2], out[1]) if prior else out


def outputs_and_gradients(run, case: Case, arrays: dict, reset, cotangents):
    outputs, pull = jax.vjp(lambda arrays: run(case, arrays, reset), arrays)
    return outputs, pull(tuple(c.astype(y.dtype) for c, y in zip(cotangents, outputs)))[0]


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / (scale if scale else 1.0))


MARKED = [pytest.param(case, marks=pytest.mark.slow) if case.slow else case for case in CASES]


def check(run, case: Case, seed: int, tolerance: dict = TOLERANCE) -> None:
    """y, the final state and the gradient of every array, with a cotangent for both outputs, by the sequential loop."""
    arrays, reset = draw(case, seed)
    batch, length, channels, states = case.shape
    rng = np.random.default_rng(99)
    cotangents = [rng.standard_normal((batch, length, channels)), rng.standard_normal((batch, channels, states))]
    cotangents[0] = np.asarray(jnp.asarray(cotangents[0], case.dtype), np.float64)
    cotangents[1] = np.asarray(cotangents[1], np.float32)
    outputs, gradients = outputs_and_gradients(run, case, arrays, reset, map(jnp.asarray, cotangents))
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        expected, expected_gradients = outputs_and_gradients(oracle, case, exact, reset, map(jnp.asarray, cotangents))
        expected, expected_gradients = jax.tree.map(np.asarray, (expected, expected_gradients))

    assert outputs[0].dtype == case.dtype
    assert outputs[1].dtype == jnp.float32
    pairs = {'y': (outputs[0], expected[0]), 'state': (outputs[1], expected[1])}
    pairs |= {f'd{name}': (gradients[name], expected_gradients[name]) for name in arrays}
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    assert all(errors[name] <= tolerance[actual.dtype] for name, (actual, _) in pairs.items()), errors


@pytest.mark.parametrize('case', MARKED, ids=str)
def test_equals_the_sequential_loop(case: Case):
    check(kernel, case, seed=CASES.index(case))


@pytest.mark.slow  # the cases of the cards, which tests/gpu/test_accept.py runs, ask it, too
def test_the_same_call_gives_the_same_bits():
    case = Case((2, 19, 200, 16), **FULL, resets=(3,))
    arrays, reset = draw(case, 0)
    ones = (jnp.ones((2, 19, 200)), jnp.ones((2, 200, 16)))
    runs = [outputs_and_gradients(kernel, case, arrays, reset, ones) for _ in range(2)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *runs)


def test_a_missing_wait_is_detected(monkeypatch):
    """The oracle's own oracle: race detection sees a tile that is read before it has arrived."""
    from kernels_pallas.mosaic import Tiles

    monkeypatch.setattr(Tiles, 'wait', lambda self, slot: self.fence())
    case = Case((1, 33, 128, 8))
    arrays, reset = draw(case, 0)
    try:
        with pytest.raises(Exception, match=r'(?i)race|barrier|never'):
            jax.block_until_ready(kernel(case, arrays, reset))
    finally:
        interpreted.reset()


def test_time_is_split_only_where_blocks_do_not_fill_the_gpu():
    """Two to four blocks a multiprocessor after a split, none for a full GPU, and no slice shorter than eight tiles."""
    assert time_splits(blocks=32, length=65536, cores=132, tile=32) == 16  # measured: 4.4 times as fast as one
    assert time_splits(blocks=8, length=131072, cores=132, tile=32) == 64
    assert time_splits(blocks=32, length=1024, cores=132, tile=32) == 4  # of eight tiles
    assert time_splits(blocks=32, length=511, cores=132, tile=32) == 1
    assert time_splits(blocks=99, length=131072, cores=132, tile=32) == 4
    assert time_splits(blocks=100, length=131072, cores=132, tile=32) == 1
    assert time_splits(blocks=256, length=4096, cores=132, tile=32) == 1
    for blocks in (1, 8, 32, 64, 99):
        for length in (1, 100, 1024, 65536):
            splits = time_splits(blocks, length, 132, 32)
            assert splits == 1 or (blocks * splits < 4 * 132 and length / splits >= 8 * 32)
            assert blocks * splits >= 2 * 132 or length / splits < 16 * 32


def test_what_cannot_run_says_why():
    case = Case((1, 4, 5, 3))
    arrays, _ = draw(case, 0)
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it needs an NVIDIA GPU, and this is for cpu"):
        selective_scan(**arrays, implementation='mosaic_gpu')
    with pytest.raises(
        ValueError, match="'mosaic_gpu' cannot run here: a delay inside the recurrence is of second order"
    ):
        selective_scan(**arrays, delay=jnp.ones(5) / 2, implementation='mosaic_gpu')
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it draws no process noise"):
        selective_scan(**arrays, process_noise=(jax.random.key(0), 0.1), implementation='mosaic_gpu')
    call = lambda **options: mosaic_gpu.scan(**arrays, settings=SMALL, generation='hopper', **options)
    for wrong in (12, -8, 24):
        with pytest.raises(
            ValueError, match=f'keep_every={wrong} must be a multiple of 8, and a multiple or a divisor of'
        ):
            call(keep_every=wrong)
    with pytest.raises(ValueError, match='splits must be at least 1, got 0'):
        call(splits=0)


def test_on_a_gpu_what_the_kernels_lack_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    monkeypatch.setattr(platform, 'compute_capability', lambda: (9, 0))
    dispatch.warn_once.cache_clear()
    arrays, _ = draw(Case((1, 4, 5, 3)), 0)
    delay = jnp.full(5, 0.5)
    with pytest.warns(UserWarning, match="runs 'chunked' in place of 'mosaic_gpu': a delay inside the recurrence"):
        y, _ = selective_scan(**arrays, delay=delay)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        selective_scan(**arrays, delay=delay)
    np.testing.assert_allclose(y, selective_scan(**arrays, delay=delay, implementation='reference')[0], rtol=1e-5)
    monkeypatch.setattr(platform, 'compute_capability', lambda: (7, 5))
    with pytest.raises(ValueError, match=r'needs compute capability 8.0 or newer, and this GPU has 7.5'):
        selective_scan(**arrays, implementation='mosaic_gpu')
