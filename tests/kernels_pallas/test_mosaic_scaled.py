"""The scan with a scaled readout by tensor cores: interpreted on the CPU, and its fragments register by register.

The interpreter has no warp's instructions: there products are plain ones of the same split numbers. What a warp does
with its registers is run here by `Warp`, which does with numbers what the PTX ISA says that the instructions do.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import cards, dispatch, platform
from kernels_pallas.selective_scan import mosaic_gpu, scaled_mosaic_gpu, selective_scan, state_products
from tests.kernels_pallas import interpreted
from tests.kernels_pallas.test_mosaic_scan import FULL, Case, check

LANE = np.arange(32)
GROUP, PLACE = LANE // 4, LANE % 4  # PTX's groupID and threadID_in_group


class Warp(state_products.Instructions):
    """On numbers: a register is [32] of float32, or [32, 2] of two bfloat16, the low half first; a vector, their list.

    What stands for a source in an instruction's text is read from there.
    """

    def multiply(self, sums, left, right):
        """PTX ISA 9, "Matrix Fragments for mma.m16n8k16 with floating point type"."""
        a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for i in range(8):
            row, column = GROUP + (0 if i < 2 or 4 <= i < 6 else 8), PLACE * 2 + i % 2 + (0 if i < 4 else 8)
            a[row, column] = left[i // 2][:, i % 2]
        for i in range(4):
            b[PLACE * 2 + i % 2 + (0 if i < 2 else 8), GROUP] = right[i // 2][:, i % 2]
            c[GROUP + (0 if i < 2 else 8), PLACE * 2 + i % 2] = sums[i]
        d = (c + a @ b).astype(np.float32)
        return [d[GROUP + (0 if i < 2 else 8), PLACE * 2 + i % 2] for i in range(4)]

    def turn(self, register):
        """PTX ISA 9, "movmatrix"."""
        matrix = np.zeros((8, 8), register.dtype)
        for j in range(2):
            matrix[GROUP, PLACE * 2 + j] = register[:, j]
        return np.stack([matrix.T[GROUP, PLACE * 2 + j] for j in range(2)], axis=1)

    def pack(self, first, second):
        """PTX ISA 9, "cvt": of `d, a, b`, a goes to the upper half and b to the lower."""
        sources = {'$1': first, '$2': second}
        _, upper, lower = re.findall(r'\$\d', self.PACK)
        return np.stack([sources[lower], sources[upper]], axis=1).astype(ml_dtypes.bfloat16)

    def rest(self, number, pair, half):
        return number - pair[:, half].astype(np.float32)

    def zero(self):
        return np.zeros(32, np.float32)

    def add(self, a, b):
        return a + b

    floats = words = vector = halves = staticmethod(list)


def registers(states: np.ndarray) -> list[np.ndarray]:
    """[4, 4, 32]: what each lane holds of a warp's states [32, 16], by `LAYOUT`: channel of 4, state of 4."""
    return [[states[GROUP + 8 * i, 4 * PLACE + j] for j in range(4)] for i in range(4)]


def parts_of(states: np.ndarray):
    """High and low, as the kernels split and hold them."""
    found = state_products._split(Warp(), registers(states))
    return found[:4], found[4:]


def drawn(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def relative(actual, expected) -> float:
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


def test_a_layout_puts_a_warps_numbers_where_its_registers_are_said_to_have_them():
    """By the tiling alone, which is what Mosaic reads and writes memory by."""

    def placed(layout, shape):
        found = np.arange(np.prod(shape)).reshape(shape)
        for tile in layout.to_mgpu().tiling.tiles:
            lead, last = found.shape[: found.ndim - len(tile)], found.shape[found.ndim - len(tile) :]
            split = found.reshape(*lead, *(n for pair in zip(np.floor_divide(last, tile), tile) for n in pair))
            outer = [len(lead) + 2 * i for i in range(len(tile))]
            found = split.transpose(*range(len(lead)), *outer, *(i + 1 for i in outer))
        place = layout.to_mgpu()
        warps = [dim for dim in place.warp_dims if isinstance(dim, int)]
        chosen = [dim % found.ndim for dim in (*warps, *place.lane_dims)]
        rest = [dim for dim in range(found.ndim) if dim not in chosen]
        return found.transpose(*chosen, *rest).reshape(-1, 32, found.size // (32 * (4 if warps else 1)))

    index = np.arange(4 * 32 * 16).reshape(4, 32, 16)
    states = [[index[warp, GROUP + 8 * i, 4 * PLACE + j] for i in range(4) for j in range(4)] for warp in range(4)]
    np.testing.assert_array_equal(placed(state_products.LAYOUT, (4, 32, 16)), np.moveaxis(np.array(states), 1, 2))
    index = np.arange(4 * 8 * 16).reshape(4, 8, 16)
    folded = [[index[warp, GROUP, 4 * PLACE + j] for j in range(4)] for warp in range(4)]
    np.testing.assert_array_equal(placed(state_products.FOLDED, (4, 8, 16)), np.moveaxis(np.array(folded), 1, 2))
    np.testing.assert_array_equal(placed(state_products.SUMS, (4, 32, 8)), np.arange(1024).reshape(4, 32, 8))
    np.testing.assert_array_equal(placed(state_products.BY_LANE, (32, 4)), np.arange(128).reshape(1, 32, 4))


def test_a_warps_product_is_that_of_its_states():
    states, matrix, initial = drawn((32, 16), (16, 16), (32, 16))
    fragments = np.asarray(state_products.fragments(jnp.asarray(matrix)))
    factor = [[part[:, n].copy().view(ml_dtypes.bfloat16).reshape(32, 2) for n in range(4)] for part in fragments]
    found = state_products._multiply(Warp(), *parts_of(states), *([part] for part in factor), registers(initial))
    exact = initial + states.astype(np.float64) @ matrix
    assert relative(found, np.array(registers(exact))) < 2**-17
    whole = state_products.multiply(
        state_products.split(jnp.tile(states, (4, 1, 1)), interpret=True),
        tuple(jnp.asarray(part) for part in fragments),
        jnp.tile(initial, (4, 1, 1)),
        interpret=True,
    )
    assert relative(whole[1], exact) < 2**-17  # as the interpreter has it


def test_a_warps_outer_product_is_that_of_its_channels():
    x, y = drawn((32, 16), (32, 16))
    found = np.stack(state_products._outer(Warp(), *parts_of(x), *parts_of(y))[0], axis=1)
    exact = x.astype(np.float64).T @ y
    assert relative(state_products.unfolded(jnp.asarray(found)), exact) < 2**-17
    halves = [state_products.split(jnp.tile(z, (4, 1, 1)), interpret=True) for z in (x, y)]
    whole = state_products.outer(*halves, interpret=True)
    assert relative(whole[2], found) < 1e-6  # as the interpreter has it


def test_a_thread_adds_up_its_four_channels():
    (x,) = drawn((32, 16))
    (found,) = state_products._folded(Warp(), registers(x))
    whole = state_products.folded(jnp.tile(x, (4, 1, 1)), interpret=True)
    assert relative(found, np.asarray(whole[3])[GROUP[None], 4 * PLACE + np.arange(4)[:, None]]) < 1e-6


def test_what_an_instruction_is_given_stands_in_its_text_in_the_order_of_the_call():
    """A result, then factors and sums: $0 to $3 are what is returned, and so on."""
    numbers = [int(n) for n in re.findall(r'\$(\d+)', state_products.Instructions.MULTIPLY)]
    assert numbers == list(range(14)) and re.findall(r'\$(\d)', state_products.Instructions.TURN) == ['0', '1']


# Products of numbers split in two: by chance Z's gradient was up to 1.8e-5 of its largest number off.
TOLERANCE = {jnp.dtype(jnp.float32): 3e-5, jnp.dtype(jnp.bfloat16): 5e-3}
CASES = [
    Case((2, 9, 128, 16), **FULL, resets=(5, 8)),
    Case((2, 19, 128, 16), **FULL, resets=(5, 8), slow=True),
    Case((2, 11, 256, 7), **FULL, resets=(0, 8, 10), slow=True),  # tokens behind the end, of several rows and blocks
    Case((1, 8, 256, 16), jnp.bfloat16, **FULL, slow=True),
    Case((2, 16, 128, 5), softplus=True, padded=True, resets=(15,), slow=True),
    Case((1, 1, 128, 16), state=True),
]


def kernel(case: Case, arrays: dict, reset):
    return scaled_mosaic_gpu.scan(**arrays, dt_softplus=case.softplus, reset=reset, interpret=interpreted.parameters())


@pytest.mark.parametrize('case', [pytest.param(c, marks=[pytest.mark.slow] if c.slow else []) for c in CASES], ids=str)
def test_equals_the_sequential_loop(case):
    check(kernel, replace(case, readout=True), seed=CASES.index(case), tolerance=TOLERANCE)


def on_a_gpu(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    monkeypatch.setattr(platform, 'compute_capability', lambda: capability)


def taken(monkeypatch, shape=(16, 2048, 1536), states=16, dtype=jnp.bfloat16, implementation=None, **options) -> str:
    """Which kernel a call with a scaled readout runs, without running it."""
    ran = []

    def stand_in(name):
        def scan(*_, **__):
            ran.append(name)
            return jnp.zeros(shape, dtype), jnp.zeros((shape[0], shape[2], states))

        return scan

    for name, module in (('mosaic_gpu', mosaic_gpu), ('mosaic_gpu_scaled', scaled_mosaic_gpu)):
        monkeypatch.setattr(module, 'scan', stand_in(name))
    given = lambda *sizes, kind=jnp.float32: jax.ShapeDtypeStruct(sizes, kind)
    batch, length, channels = shape
    u, projection = given(*shape, kind=dtype), given(batch, length, states)
    readout = (given(states, states), given(states), None)
    call = lambda u, A, B, readout: selective_scan(
        u, u, A, B, B, readout=readout, implementation=implementation, **options
    )
    jax.eval_shape(call, u, given(channels, states), projection, readout)
    return ran[0]


def test_it_runs_where_a_gpu_has_verified_it_and_the_call_suits(monkeypatch):
    on_a_gpu(monkeypatch)
    scaled, other = 'mosaic_gpu_scaled', 'mosaic_gpu'
    monkeypatch.setattr(cards, 'trusted', lambda: True)
    assert taken(monkeypatch) == scaled
    assert taken(monkeypatch, states=7) == scaled
    assert taken(monkeypatch, keep_every=64) == other
    assert taken(monkeypatch, shape=(16, 2048, 1500)) == other
    assert taken(monkeypatch, shape=(1, 8192, 1536)) == other  # 12 blocks: time is cut
    assert taken(monkeypatch, shape=(4, 256, 1536)) == scaled  # 48, too short to be
    assert taken(monkeypatch, prior=True) == other
    monkeypatch.setattr(cards, 'trusted', lambda: False)
    verified = lambda kernel, variants, *_: 'not verified' if 'scaled' in variants else None
    monkeypatch.setattr(cards, 'uncovered', verified)
    monkeypatch.setattr(cards, 'other_jax', lambda *_: None)
    dispatch.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"runs 'mosaic_gpu' in place of 'mosaic_gpu_scaled': not verified"):
        assert taken(monkeypatch) == other
    assert taken(monkeypatch, implementation=scaled) == scaled
    with pytest.raises(
        ValueError, match=r"'mosaic_gpu_scaled' cannot run here: it takes channels in blocks of 128, and"
    ):
        taken(monkeypatch, shape=(16, 2048, 1500), implementation=scaled)
    on_a_gpu(monkeypatch, (8, 0))
    with pytest.raises(ValueError, match=r'written for compute capability 9.0, and this GPU has 8.0'):
        taken(monkeypatch, implementation=scaled)
