"""Context parallel: slices on several devices give, in float64, what the sequential functions give on one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import adaptive_gain, attention, context_parallel, exchange
from kernels_pallas.modal_conv import context_parallel as modal_conv_cp
from kernels_pallas.selective_scan import api, selective_scan
from kernels_pallas.wkv import context_parallel as wkv_cp

B, T, D, N, H, P = 2, 16, 4, 3, 2, 4
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SHARDS = (2, 4, 8)
# Each number of shards compiles anew: all are always run of the exchange itself.
DEAR = (slow(2), 4, slow(8))
SPLIT, WHOLE = PartitionSpec(None, 'context'), PartitionSpec()
TOLERANCE = {'rtol': 1e-9, 'atol': 1e-10}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def on_shards(function, shards, outputs, **arguments):
    """Runs ``function(**arguments)`` with the tokens on ``shards`` devices: what `TOKENS` names is split along time."""
    specs = {name: SPLIT if name in TOKENS else WHOLE for name in arguments}
    mesh = jax.make_mesh((shards,), ('context',), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])
    call = lambda arguments: function(**arguments)
    return jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=outputs, check_vma=False)(arguments)


TOKENS = ('u', 'dt', 'z', 'B', 'C', 'reset', 'e', 'alpha', 'log_decay', 'q', 'k', 'v', 'segment_ids', 'x', 'mask')
BORDERS = {
    'none': (),
    'on every border': (0, 2, 4, 6, 8, 10, 12, 14),
    'off the borders': (1, 5, 11),
    'one in the middle': (8,),
}


def resets(name):
    """Starts of documents in the first row; the second row has another set."""
    reset = np.zeros((B, T), bool)
    reset[0, list(BORDERS[name])] = True
    reset[1, 7] = name != 'none'
    return jnp.asarray(reset)


def graded(function, arrays):
    """Outputs and the gradients of all arrays of a loss that reads every output."""

    def loss(arrays):
        outputs = function(**arrays)
        weights = [jax.random.normal(jax.random.key(i), y.shape) for i, y in enumerate(outputs)]
        return sum(jnp.vdot(weight, jnp.sin(y)) for weight, y in zip(weights, outputs)), outputs

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return outputs, gradients


def assert_close(actual, expected, **tolerance):
    tolerance = tolerance or TOLERANCE
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, float), b, **tolerance), actual, expected)


# ----- selective scan -----
def draw_scan(seed, delay=False):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    dt = np.log1p(np.exp(rng.normal(size=(B, T, D)) - 1))
    dt[:, rng.random(T) < 0.15] = 0
    arrays = {
        'u': normal(B, T, D), 'dt': jnp.asarray(dt), 'A': -jnp.exp(normal(D, N)), 'B': normal(B, T, N),
        'C': normal(B, T, N), 'D': normal(D), 'initial_state': normal(*((B, 2, D, N) if delay else (B, D, N))),
    }  # fmt: skip
    if delay:
        arrays['delay'] = jax.nn.sigmoid(normal(D))
    else:
        arrays |= {'z': normal(B, T, D), 'dt_bias': normal(D)}
    return arrays, (normal(N, N), normal(N), normal(N, N))


def whole_scan(scan, arrays, reset, readout, delay, **options):
    """Every option; noise, which takes long to compile, and what is fused with the scan only without the delay."""
    more = {} if delay else {'process_noise': (jax.random.key(5), 0.1), 'dt_softplus': True}
    return scan(**arrays, reset=reset, readout=readout, prior=True, **more, **options)


@functools.cache
def scan_on_one(delay):
    def run(arrays, reset, readout):
        options = {'delay': delay, 'implementation': 'reference'}
        return graded(lambda **arrays: whole_scan(selective_scan, arrays, reset, readout, **options), arrays)

    return jax.jit(run)


@functools.cache
def scan_on_shards(shards, delay):
    def local(reset, readout, **arrays):
        return whole_scan(context_parallel.selective_scan, arrays, reset, readout, delay, chunk=2)

    def run(arrays, reset, readout):
        outputs, more = (SPLIT, WHOLE, SPLIT), {'reset': reset, 'readout': readout}
        return graded(lambda **arrays: on_shards(local, shards, outputs, **arrays, **more), arrays)

    return jax.jit(run)


@pytest.mark.parametrize('borders', BORDERS)
@pytest.mark.parametrize(
    'shards, delay',
    [slow(2, False), (4, False), slow(8, False), slow(2, True), (4, True), slow(8, True)],
    ids=lambda value: {False: 'plain', True: 'delay'}[value] if isinstance(value, bool) else str(value),
)
def test_selective_scan(shards, delay, borders):
    """Outputs, a-priori outputs, final state and all gradients, with readout, skip, gate and process noise."""
    arrays, readout = draw_scan(len(borders), delay)
    args = (arrays, resets(borders), readout)
    assert_close(scan_on_shards(shards, delay)(*args), scan_on_one(delay)(*args))


def test_kernels_of_a_readout_leave_moving_the_states_to_those_without(monkeypatch):
    named, chunked = [], functools.partial(selective_scan, implementation='chunked')

    @functools.wraps(selective_scan)
    def heard(*args, implementation, **kwargs):
        named.append(implementation)
        return chunked(*args, **kwargs)

    monkeypatch.setattr(api, 'selective_scan', heard)
    arrays, readout = draw_scan(0)
    scan = functools.partial(context_parallel.selective_scan, implementation='mosaic_gpu_scaled')
    run = lambda reset, readout, **arrays: scan(**arrays, dt_softplus=True, reset=reset, readout=readout)
    found = on_shards(run, 2, (SPLIT, WHOLE), **arrays, reset=resets('none'), readout=readout)
    assert named == ['mosaic_gpu', 'mosaic_gpu_scaled']
    assert_close(found, chunked(**arrays, dt_softplus=True, reset=resets('none'), readout=readout))


def test_no_buffer_holds_the_states_of_all_tokens():
    length, channels, states = 512, 16, 16
    shapes = {'u': (channels,), 'dt': (channels,), 'B': (states,), 'C': (states,)}
    arrays = {name: jax.ShapeDtypeStruct((1, length, *shape), jnp.float32) for name, shape in shapes.items()}
    arrays['A'] = jax.ShapeDtypeStruct((channels, states), jnp.float32)
    run = lambda **arrays: on_shards(context_parallel.selective_scan, 2, (SPLIT, WHOLE), **arrays)
    text = jax.jit(lambda arrays: graded(run, arrays)[1]).lower(arrays).compile().as_text()
    found = re.findall(r'(?:pred|[a-z]+[0-9]+)\[([0-9,]+)\]', text)
    largest = max(math.prod(int(size) for size in shape.split(',')) for shape in found)
    assert length * channels / 2 <= largest <= length * channels * states / 2 / 4


# ----- gains -----
def draw_gain(kind, seed):
    rng = np.random.default_rng(seed)
    return {
        'e': jnp.asarray(rng.normal(size=(B, T, H, P))),
        'alpha': jnp.asarray(rng.uniform(size=(B, T, H))),
        'log_decay': -jnp.asarray(rng.exponential(0.1, size=(B, T, H))),
        'initial_gain': jnp.asarray(rng.normal(size=(B, H, P, P) if kind == 'matrix' else (B, H, P))),
    }


@functools.cache
def gain_on_one(kind):
    gain = getattr(adaptive_gain, f'{kind}_gain')
    return jax.jit(
        lambda arrays, reset: graded(lambda **arrays: gain(**arrays, reset=reset, implementation='reference'), arrays)
    )


@functools.cache
def gain_on_shards(kind, shards):
    gain = getattr(context_parallel, f'{kind}_gain')
    local = functools.partial(gain, chunk=4) if kind == 'matrix' else gain
    return jax.jit(
        lambda arrays, reset: graded(
            lambda **arrays: on_shards(local, shards, (SPLIT, WHOLE), **arrays, reset=reset), arrays
        )
    )


@pytest.mark.parametrize('borders', BORDERS)
@pytest.mark.parametrize('kind', ['matrix', 'diagonal'])
@pytest.mark.parametrize('shards', DEAR)
def test_gain(shards, kind, borders):
    """Reads, final gain and all gradients."""
    args = (draw_gain(kind, len(borders)), resets(borders))
    assert_close(gain_on_shards(kind, shards)(*args), gain_on_one(kind)(*args))


# ----- tokens before, attention -----
@pytest.mark.parametrize('length', [0, 3, 20, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 7))])
@pytest.mark.parametrize('shards', SHARDS)
def test_previous_tokens_reach_over_several_shards(shards, length):
    """Each shard's window is that of the whole row, zeros before it; the gradient counts who reads a token."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)))
    tokens = T // shards
    ends = tokens * np.arange(shards)
    expected = lambda x: jnp.concatenate(
        [jnp.pad(x, ((0, 0), (length, 0), (0, 0)))[:, e : e + length] for e in ends], 1
    )
    local = functools.partial(context_parallel.previous, length=length, axis_name='context')
    found = lambda x: on_shards(local, shards, SPLIT, x=x)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(B, length * shards, D)))
    for function in (found, expected):
        assert function(x).shape == weight.shape
    np.testing.assert_array_equal(found(x), expected(x))
    gradient = lambda function: jax.grad(lambda x: jnp.vdot(weight, function(x)))(x)
    np.testing.assert_allclose(gradient(found), gradient(expected), atol=1e-14)


@pytest.mark.parametrize('dtype', ['float64', 'bfloat16'])
@pytest.mark.parametrize('shards', DEAR)
def test_attention(shards, dtype):
    """In bfloat16 too, of which XLA:CPU refuses some sums over devices."""
    rng = np.random.default_rng(shards)
    arrays = {name: jnp.asarray(rng.normal(size=(B, T, h, P)), dtype) for name, h in (('q', 4), ('k', 2), ('v', 2))}
    ids = 1 + jnp.cumsum(resets('off the borders'), 1).at[1, -3:].set(-1)  # the second row ends in padding
    one = lambda **arrays: (attention.attention(**arrays, segment_ids=ids, implementation='reference'),)
    local = lambda **arrays: (context_parallel.attention(**arrays, block_size=4),)
    many = lambda **arrays: on_shards(local, shards, (SPLIT,), **arrays, segment_ids=ids)
    got, want = (jax.jit(functools.partial(graded, function))(arrays) for function in (many, one))
    assert_close(got, want, **({'rtol': 0.1, 'atol': 0.05} if dtype == 'bfloat16' else {}))


# ----- the exchange itself -----
@pytest.mark.parametrize('method', exchange.METHODS)
@pytest.mark.parametrize('shards', range(1, 9))
def test_any_number_of_shards_exchange_their_maps(shards, method):
    """Matrices, which do not commute, so that the order counts."""
    rng = np.random.default_rng(shards)
    linear, constant, x = rng.normal(size=(shards, 3, 3)), rng.normal(size=(shards, 3)), rng.normal(size=3)
    expected = [x]
    for M, v in zip(linear, constant):
        expected.append(M @ expected[-1] + v)

    def local(linear, constant, x):
        options = {'act': jnp.matmul, 'compose': lambda first, second: second @ first}
        return exchange.entering_state(linear[0], constant[0], x, **options, axis_name='i', method=method)[None]

    mesh = jax.make_mesh((shards,), ('i',), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])
    i = PartitionSpec('i')
    run = jax.shard_map(local, mesh=mesh, in_specs=(i, i, WHOLE), out_specs=i, check_vma=False)
    np.testing.assert_allclose(jax.jit(run)(linear, constant, x), np.stack(expected[:-1]), rtol=1e-12)


def test_an_unknown_exchange_is_refused():
    arrays, _ = draw_scan(0)
    local = functools.partial(context_parallel.selective_scan, exchange_by='pigeon')
    with pytest.raises(ValueError, match="no exchange 'pigeon'; available: permute, gather"):
        on_shards(local, 2, (SPLIT, WHOLE), **arrays)


# ----- recurrences with a mask -----
def draw_masked(name):
    """Arguments of `wkv` or `modal_conv`, whose resets fall on padding, too."""
    rng = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    reset, mask = jnp.asarray(rng.random((B, T)) < 0.3), jnp.asarray(rng.random((B, T)) < 0.7)
    arrays = {'v': normal(B, T, D), 'reset': reset, 'mask': mask}
    if name == 'wkv':
        state = jnp.stack([normal(B, D), normal(B, D) ** 2, normal(B, D)], 1)
        return arrays | {'k': normal(B, T, D), 'decay': normal(D) ** 2, 'bonus': normal(D), 'initial_state': state}
    poles = {'rate': normal(N, D) ** 2, 'angle': normal(N, D), 'residue': normal(2, N, D), 'skip': normal(D)}
    return arrays | poles | {'initial_state': normal(B, 2, N, D)}


@pytest.mark.parametrize('module', [wkv_cp, modal_conv_cp], ids=['wkv', 'modal_conv'])
def test_a_reset_that_is_padding_leaves_the_state(module):
    function = module.CALL.function
    arrays = draw_masked(function.__name__)
    assert bool((arrays['reset'] & ~arrays['mask']).any())
    real = lambda y, state: (jnp.where(arrays['mask'][..., None], y, 0), state)
    wanted = real(*function(**arrays | {'reset': arrays['reset'] & arrays['mask']}))
    assert_close(real(*function(**arrays)), wanted)
    assert_close(real(*on_shards(module.CALL.context_parallel, 4, (SPLIT, WHOLE), **arrays)), wanted)
