"""The rules of the copy engine hold for every kernel at any shape; a fault of each kind, planted, is caught.

Kernels are traced, not run: all that the rules speak of is known by then. On a GPU a broken rule is an illegal
instruction or a row overwritten by its neighbour; JAX's checks and the interpreter see neither.
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic
from kernels_pallas.adaptive_gain import diagonal_mosaic_gpu as diagonal
from kernels_pallas.adaptive_gain import mosaic_gpu as gain
from kernels_pallas.causal_conv1d import mosaic_gpu as conv
from kernels_pallas.grouped_matmul import mosaic_gpu as grouped
from kernels_pallas.mosaic import Copy, CopyError, Index, Span
from kernels_pallas.selective_scan import mosaic_gpu as scan
from kernels_pallas.selective_scan import scaled_mosaic_gpu as scaled
from kernels_pallas.ssd import mosaic_gpu as ssd

ROOT = pathlib.Path(mosaic.__file__).parent
LENGTHS = st.one_of(st.integers(1, 70), st.integers(250, 5000))
DTYPES = st.sampled_from([jnp.bfloat16, jnp.float32])
shape = jax.ShapeDtypeStruct


def traced(function, *args) -> list[Copy]:
    """Every copy of the kernels that a call launches, checked while they are traced."""
    with mosaic.recorded() as copies:
        jax.eval_shape(function, *args)
    assert copies
    return copies


def obeys(copies: list[Copy]) -> None:
    """The rules once more, from the numbers alone."""
    for copy in copies:
        assert 1 <= len(copy.shape) <= 5 and len(copy.box) == len(copy.shape)
        assert max(copy.box) <= 256
        assert copy.box[-1] * copy.itemsize % 16 == 0 and copy.multiples[-1] * copy.itemsize % 16 == 0
        assert all(math.prod(copy.shape[axis:]) * copy.itemsize % 16 == 0 for axis in range(1, len(copy.shape)))
        assert copy.place % 128 == 0
        assert max(copy.shape) <= 2**32 and math.prod(copy.shape[1:]) * copy.itemsize < 2**40
        assert copy.shared == math.prod(copy.box)
        assert copy.arrivals == copy.together
        if copy.store:
            assert not overwrites(copy)


def overwrites(copy: Copy) -> bool:
    """Whether the box is one run of elements, some of which may lie beyond the end of a row that another follows."""
    strides = [math.prod(copy.shape[axis + 1 :]) for axis in range(len(copy.shape))]
    reach = sum((size - 1) * stride for size, stride in zip(copy.box, strides)) + 1
    outermost = min(axis for axis, size in enumerate(copy.box) if size > 1)
    beyond = any(
        copy.shape[axis] % size or copy.multiples[axis] % size for axis, size in enumerate(copy.box) if size > 1
    )
    return reach == math.prod(copy.box) and beyond and math.prod(copy.shape[:outermost]) > 1


def property_test(function):
    options = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    return options(function)


@property_test
@given(
    batch=st.integers(1, 5), length=LENGTHS, channels=st.integers(1, 700), states=st.integers(1, 64), dtype=DTYPES,
    options=st.sets(st.sampled_from(['gate', 'softplus', 'reset', 'readout', 'prior', 'kept', 'split'])),
)  # fmt: skip
def test_selective_scan(batch, length, channels, states, dtype, options):
    """Forward, carry, cocarry, refinement and backward."""
    states = min(states, 16) if 'readout' in options else states
    tokens = shape((batch, length, channels), dtype)
    arrays = {'u': tokens, 'dt': tokens, 'A': shape((channels, states), jnp.float32)}
    arrays |= {name: shape((batch, length, states), jnp.float32) for name in ('B', 'C')}
    if 'gate' in options:
        arrays['z'] = tokens
    if 'readout' in options:
        arrays |= {'Z': shape((states, states), jnp.float32), 'g': shape((states,), jnp.float32)}
    reset = shape((batch, length), jnp.bool_) if 'reset' in options else None
    held = scan.padded_states(states, 'readout' in options)
    tile = scan.tuning.settings('hopper', held, jnp.dtype(dtype).itemsize, 'readout' in options).backward_tile

    def run(arrays, reset):
        call = lambda arrays: scan.scan(
            **arrays, dt_softplus='softplus' in options, reset=reset, prior='prior' in options, generation='hopper',
            keep_every=4 * tile if 'kept' in options else None, splits=3 if 'split' in options else None, cores=132,
        )  # fmt: skip
        outputs, pull = jax.vjp(call, arrays)
        return pull(outputs)

    obeys(traced(run, arrays, reset))


@property_test
@given(
    batch=st.integers(1, 5), length=LENGTHS, blocks=st.integers(1, 5), states=st.integers(1, 16), dtype=DTYPES,
    gate=st.booleans(), reset=st.booleans(),
)  # fmt: skip
def test_selective_scan_with_a_scaled_readout(batch, length, blocks, states, dtype, gate, reset):
    """Forward and backward."""
    number = lambda *sizes: shape(sizes, jnp.float32)
    tokens, maps, channels = shape((batch, length, 128 * blocks), dtype), number(batch, length, states), 128 * blocks
    arrays = {'u': tokens, 'dt': tokens, 'A': number(channels, states), 'B': maps, 'C': maps}
    arrays |= {'Z': number(states, states), 'g': number(states)} | ({'z': tokens} if gate else {})

    def run(arrays, starts):
        outputs, pull = jax.vjp(lambda arrays: scaled.scan(**arrays, reset=starts if reset else None), arrays)
        return pull(outputs)

    obeys(traced(run, arrays, shape((batch, length), jnp.bool_)))


@property_test
@given(
    batch=st.integers(1, 5), length=LENGTHS, heads=st.integers(1, 13), width=st.sampled_from(gain.WIDTHS),
    reset=st.booleans(),
)  # fmt: skip
def test_adaptive_gain(batch, length, heads, width, reset):
    """Forward, backward and replay."""
    steps = shape((batch, length, heads), jnp.float32)
    arrays = shape((batch, length, heads, width), jnp.float32), steps, steps
    initial, flags = shape((batch, heads, width, width), jnp.float32), shape((batch, length), jnp.bool_)

    def run(e, alpha, log_decay, initial, flags):
        call = lambda *args: gain.matrix(*args[:3], flags if reset else None, args[3])
        outputs, pull = jax.vjp(call, e, alpha, log_decay, initial)
        return pull(outputs)

    obeys(traced(run, *arrays, initial, flags))


@property_test
@given(
    batch=st.integers(1, 5), length=LENGTHS, heads=st.integers(1, 13), width=st.sampled_from(diagonal.WIDTHS),
    reset=st.booleans(), segments=st.sampled_from([None, 1, 2, 5]),
)  # fmt: skip
def test_diagonal_gain(batch, length, heads, width, reset, segments):
    """Forward and backward, and where time is cut the passes before them."""
    steps = shape((batch, length, heads), jnp.float32)
    arrays = shape((batch, length, heads, width), jnp.float32), steps, steps
    initial, flags = shape((batch, heads, width), jnp.float32), shape((batch, length), jnp.bool_)

    def run(e, alpha, log_decay, initial, flags):
        call = lambda *args: diagonal.diagonal(*args[:3], flags if reset else None, args[3], segments)
        outputs, pull = jax.vjp(call, e, alpha, log_decay, initial)
        return pull(outputs)

    obeys(traced(run, *arrays, initial, flags))


def conv_gradient(batch, length, channels, dtype, lags, past=False, bias=True):
    """The arguments of a trace of the convolution's gradient, and the function."""
    tokens = shape((batch, length, channels), dtype)
    args = tokens, tokens, shape((len(lags), channels), jnp.float32), shape((channels,), jnp.float32)
    reach, before = shape((batch, length), jnp.int32), shape((batch, max(lags), channels), dtype)

    def run(x, dy, weight, b, reach, before):
        return conv.gradient(
            x, dy, weight, b if bias else None, reach, before if past else None, lags, silu=True, residual=False
        )

    return run, *args, reach, before


@property_test
@given(
    batch=st.integers(1, 5), length=LENGTHS, channels=st.integers(1, 1500), dtype=DTYPES,
    lags=st.sets(st.integers(1, 8), min_size=1, max_size=7).map(lambda lags: (*sorted(lags, reverse=True), 0)),
    past=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_causal_conv1d(batch, length, channels, dtype, lags, past, bias):
    obeys(traced(*conv_gradient(batch, length, channels, dtype, lags, past, bias)))


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=LENGTHS, groups=st.integers(1, 70), width=st.integers(1, 41), columns=st.integers(1, 41),
    tile=st.sampled_from([64, 128, 192]),
)  # fmt: skip
def test_grouped_matmul(rows, groups, width, columns, tile):
    """Product and gradients. Rows for tensor cores come in pieces of 8, of which a copy takes whole ones."""
    width, columns = 64 * width, 64 * columns
    arrays = shape((rows, width), jnp.bfloat16), shape((groups, width, columns), jnp.bfloat16)

    def run(x, w, group_sizes):
        call = lambda x, w: grouped.grouped_matmul(x, w, group_sizes, None, grouped.Settings(columns=tile))
        y, pull = jax.vjp(call, x, w)
        return pull(y)

    copies = traced(run, *arrays, shape((groups,), jnp.int32))
    obeys(copies)
    whole = [copy for copy in copies if not copy.store or copy.box[0] == 64]
    assert {copy.store for copy in whole} == {False, True}
    assert all(copy.box[0] % 8 == 0 and copy.multiples[0] % 8 == 0 for copy in whole)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 5), length=st.integers(64, 3000), groups=st.integers(1, 3), shared=st.integers(1, 5),
    parts=st.integers(1, 3), keys=st.sampled_from([64, 128]),
)  # fmt: skip
def test_ssd(batch, length, groups, shared, parts, keys):
    """Outputs, states and gradients; lengths are padded to whole chunks."""
    heads, by_key = groups * shared, shape((batch, length, groups, keys), jnp.bfloat16)
    x, by_head = shape((batch, length, heads, 64 * parts), jnp.bfloat16), shape((batch, length, heads), jnp.float32)

    def run(x, decay, B, C, step, state):
        call = lambda *arrays: ssd.ssd(*arrays, None, state)
        outputs, pull = jax.vjp(call, x, decay, B, C, step)
        return pull(outputs)

    state = shape((batch, heads, 64 * parts, keys), jnp.float32)
    copies = traced(run, x, by_head, by_key, by_key, by_head, state)
    obeys(copies)
    assert {copy.store for copy in copies} == {False, True}


@settings(deadline=None)
@given(tokens=st.integers(1, 10**6), slices=st.integers(1, 528))
def test_slices_of_a_convolution_start_where_a_copy_may_and_cover_all_tokens(tokens, slices):
    """A million lengths by arithmetic: int32 positions, in multiples of 16 bytes."""
    length = conv.slice_length(tokens, slices)
    assert 4 * length % 16 == 0
    assert length * slices >= tokens and length < -(-tokens // slices) + 4


# ------------------------------------------------------------------------------------------------------ planted faults
def test_the_crash_of_9ac71f1_planted_back_is_caught(monkeypatch):
    """Slices of 257 and 342 tokens: an H200 ended them with CUDA_ERROR_ILLEGAL_INSTRUCTION, while 256 ran."""
    monkeypatch.setattr(conv, 'slice_length', lambda tokens, slices: -(-tokens // slices))
    traced(*conv_gradient(2, 512, 256, jnp.bfloat16, (3, 2, 1, 0)))
    for batch, length, channels in ((1, 1026, 256), (16, 2048, 1536)):
        with pytest.raises(CopyError, match=r'starts at a multiple of [48] bytes on the innermost axis'):
            traced(*conv_gradient(batch, length, channels, jnp.bfloat16, (3, 2, 1, 0)))


def test_the_overwritten_rows_planted_back_are_caught(monkeypatch):
    """Tiles of one run of bytes: on an H200 the end of one row overwrote the beginning of the next."""
    monkeypatch.setattr(gain, 'FORWARD_TILE', 1)  # what time is padded to
    e, steps = shape((2, 257, 4, 32), jnp.float32), shape((2, 257, 4), jnp.float32)
    initial = shape((2, 4, 32, 32), jnp.float32)
    monkeypatch.setattr(gain, '_Layouts', lambda width, tile, kind=gain._Layouts: kind(width, 16))
    with pytest.raises(CopyError, match='a run of bytes that goes on in the next row'):
        traced(lambda *args: gain.matrix(*args[:3], None, args[3])[0], e, steps, steps, initial)


GOOD = Copy(itemsize=4, shape=(8, 4096, 64), box=(1, 32, 64), multiples=(1, 32, 0), place=1024, shared=2048)
FAULTS = {
    'an array of 6 axes': {'shape': (1, 1, 1, 8, 4096, 64), 'box': (1, 1, 1, 1, 32, 64), 'multiples': (1,) * 5 + (0,)},
    'a box of 512 elements': {'box': (1, 512, 64), 'shared': 512 * 64},
    'an axis of 4294967312 elements': {'shape': (2**32 + 16, 1, 64)},
    '8 bytes on the innermost axis': {'box': (1, 32, 2), 'shared': 64},
    'starts at a multiple of 8 bytes': {'multiples': (1, 32, 2)},
    'a stride of 264 bytes': {'shape': (8, 4096, 66)},
    'a stride of 2199023255552 bytes': {'shape': (8, 2**33, 64)},
    'a place in shared memory at a multiple of 64 bytes': {'place': 64},
    '8192 bytes for a place of 4096': {'shared': 1024},
    '2 copies for a barrier of 3 arrivals': {'arrivals': 3, 'together': 2},
    'a run of bytes that goes on in the next row': {'shape': (8, 4100, 64), 'store': True},
}


@pytest.mark.parametrize('fault', FAULTS)
def test_every_rule_is_checked(fault):
    assert GOOD.violations() == []
    assert any(
        text.startswith(fault) or fault in text for text in dataclasses.replace(GOOD, **FAULTS[fault]).violations()
    )


@pytest.mark.parametrize(
    'copy',
    [
        {'shape': (8, 4096, 64)},  # ends with the axis
        {'shape': (1, 4100, 64)},  # ends with the array
        {'shape': (8, 4100, 128)},  # not one run
        {'shape': (8, 4100, 64), 'store': False},  # fetched by a tensor map
    ],
    ids=str,
)
def test_runs_of_bytes_that_end_where_they_should_are_allowed(copy):
    assert dataclasses.replace(GOOD, **({'store': True} | copy)).violations() == []


def launched(dtype=jnp.float32, width=64, slots=2, arrivals=1, start=lambda k: Index(k) * 32, tile=32):
    """Traces a kernel that fetches tiles `[tile, width]` of x [2, 128, width] and sends them back."""

    def body(ref):
        box = lax.axis_index('row'), Span(start(lax.axis_index('tile')), tile), slice(None)
        mosaic.fetch([(ref.x, box, ref.x_)], lax.axis_index('row') * 0, ref.arrived)
        plgpu.barrier_wait(ref.arrived.at[0])
        mosaic.send(ref.x_, ref.out, box, 0)

    array = shape((2, 128, width), dtype)
    scratch = {'x_': plgpu.SMEM((slots, tile, width), jnp.float32)}
    scratch['arrived'] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)
    run = lambda x: mosaic.launch('probe', body, {'x': x}, {'out': array}, scratch, {'row': 2, 'tile': 4}, None)
    traced(run, array)


def test_what_a_kernel_asks_for_is_what_is_checked():
    launched()
    with pytest.raises(CopyError, match='1 copies for a barrier of 2 arrivals'):
        launched(arrivals=2)
    with pytest.raises(CopyError, match='a copy from bfloat16 to float32'):
        launched(dtype=jnp.bfloat16)
    with pytest.raises(CopyError, match='264 bytes on the innermost axis, no multiple of 16'):
        launched(width=66)
    with pytest.raises(CopyError, match='a place in shared memory at a multiple of 64 bytes'):
        launched(width=4, tile=4, start=lambda k: Index(k) * 4)
    with pytest.raises(CopyError, match='goes on in the next row'):
        launched(start=lambda k: Index(k) * 24)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=4), st.integers(1, 12))
def test_an_index_is_divisible_by_what_it_says(terms, factor):
    index = Index(0, 0)
    for value, times in terms:
        index = index + Index(value) * times
    index = index * factor
    assert index.value == factor * sum(value * times for value, times in terms)
    assert index.value % max(index.multiple, 1) == 0
    assert index.multiple == factor * math.gcd(*(times for _, times in terms))


def test_there_is_no_other_way_to_the_copy_engine():
    """A kernel that calls Pallas itself is not checked."""
    for path in ROOT.rglob('*.py'):
        if path.name != 'mosaic.py':
            text = path.read_text()
            assert 'copy_gmem_to_smem' not in text and 'copy_smem_to_gmem' not in text, path
