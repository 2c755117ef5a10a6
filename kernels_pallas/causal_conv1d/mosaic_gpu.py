"""The gradient of the causal convolution on NVIDIA GPUs: one kernel that reads x and dy and writes dx, once each.

XLA needs several fusions, since a token's gradient is read by every tap and its reductions fit no single one (README).
Here a thread follows two channels (one in float32) through a slice of time. In registers it holds the last L tokens and
their gradients that are not whole yet: after token t, that of token t - L is, and is written. Sums for the weights stay
in registers too, a partial one a slice, added outside in a fixed order.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic, platform
from kernels_pallas.mosaic import Index, Span, store

THREADS = 128
TILE = 32  # tokens that are fetched together
BLOCKS = 528  # enough for 132 multiprocessors with shared memory for three or four blocks each
SHORTEST = 256  # tokens of a slice: it reads L of them in vain
MAX_LAG, MAX_TAPS = 8, 8  # what registers hold
REACH = 4  # numbers that the copy engine wants in a row of `reach`, and before a box in it: 16 bytes
LOG2E = 1.4426950408889634


def unsupported(dtype: Any, lags: tuple[int, ...]) -> str | None:
    """Why these arguments cannot run here, or None."""
    capability = platform.compute_capability()
    if capability is None:
        return f'it needs an NVIDIA GPU, and this is for {platform.platform()}'
    if capability < (9, 0):
        return f'it needs compute capability 9.0 or newer, and this GPU has {capability[0]}.{capability[1]}'
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f'it takes bfloat16 or float32, not {jnp.dtype(dtype).name}'
    if not 0 < max(lags) <= MAX_LAG or len(lags) > MAX_TAPS:
        return f'it takes at most {MAX_TAPS} taps with lags to {MAX_LAG}'
    return None


def variants(silu: bool) -> tuple[str, ...]:
    """The kernel that a call runs, by the name of its card."""
    return ('silu' if silu else 'linear',)


@dataclass(frozen=True)
class _Problem:
    batch: int
    length: int
    channels: int
    slice: int  # tokens
    vector: int  # channels a thread
    lags: tuple[int, ...]
    silu: bool
    residual: bool
    bias: bool

    @property
    def slices(self) -> int:
        return -(-self.length // self.slice)

    @property
    def tiles(self) -> int:  # of a slice and the L tokens behind it, which read its last ones
        return -(-(self.slice + max(self.lags)) // TILE)

    @property
    def block(self) -> int:
        return THREADS * self.vector


def gradient(x, dy, weight, bias, reach, past, lags, silu, residual, interpret=None):
    """Gradients of x [B, T, C], weight [K, C], bias and past, the last two None where they are."""
    longest, length = max(lags), x.shape[1]
    if reach is None:
        reach = jnp.full(x.shape[:2], longest, jnp.int32)
    if past is not None:  # tokens like others, whose outputs nobody reads
        front = ((0, 0), (longest, 0))
        x = jnp.concatenate([past.astype(x.dtype), x], 1)
        dy, reach = jnp.pad(dy, (*front, (0, 0))), jnp.pad(reach, front)
    batch, total, channels = x.shape
    vector = 2 if x.dtype.itemsize == 2 else 1
    groups = -(-channels // (THREADS * vector))
    slices = max(1, min(-(-BLOCKS // (batch * groups)), total // SHORTEST))
    padded = groups * THREADS * vector
    problem = _Problem(
        batch, total, padded, slice_length(total, slices), vector, lags, silu, residual, bias is not None
    )

    wide = lambda value: jnp.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, problem.channels - channels)])
    reach = jnp.minimum(reach, jnp.arange(total, dtype=jnp.int32))
    reach = jnp.pad(reach, ((0, 0), (0, -total % REACH)))
    inputs = {'x': wide(x), 'dy': wide(dy.astype(x.dtype)), 'reach': reach, 'weight': wide(weight.astype(jnp.float32))}
    if bias is not None:
        inputs['bias'] = wide(bias.astype(jnp.float32))
    found = _kernel(problem, x.dtype, inputs, interpret)
    dx, sums = found['dx'][..., :channels], jnp.sum(found['sums'], (0, 1))[:, :channels]
    dpast = None if past is None else dx[:, :longest].astype(past.dtype)
    dbias = None if bias is None else sums[-1].astype(bias.dtype)
    return dx[:, total - length :], sums[: len(lags)].astype(weight.dtype), dbias, dpast


def slice_length(tokens: int, slices: int) -> int:
    """Tokens of a slice when so many are cut into about so many slices, each of which starts where a copy may."""
    return -(-tokens // (slices * REACH)) * REACH


def _kernel(problem: _Problem, dtype, inputs, interpret):
    width, lags, longest = problem.block, problem.lags, max(problem.lags)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=problem.vector)
    sums_of = len(lags) + problem.bias
    unroll = longest if longest in (1, 2, 4, 8) else 4  # after which registers' roles return

    def load(ref):
        return mosaic.load(ref, layout).astype(jnp.float32)

    def flag(condition):  # scalars select, vectors are multiplied
        return jnp.where(condition, 1.0, 0.0).astype(jnp.float32)

    def body(ref):
        batch, part = lax.axis_index('batch'), lax.axis_index('slice')
        block = Span(Index(lax.axis_index('channels')) * width, width)
        channels, start_of_slice = block.ds, Index(part) * problem.slice
        first = start_of_slice.value
        end = jnp.minimum(first + problem.slice, problem.length)
        tiles = mosaic.Tiles(ref, TILE, problem.tiles, batch, block, ['x', 'dy', 'reach'], first=start_of_slice)

        def token(slot, i, t, carry):
            window, partial, totals = carry
            current, g, back = load(ref.x_.at[slot, i]), load(ref.dy_.at[slot, i]), ref.reach_[slot, i]
            may_read = {lag: flag(back >= lag) for lag in lags if lag}
            masked = lambda value, lag: value * may_read[lag] if lag else value
            read = [masked((current, *window)[lag], lag) for lag in lags]
            g = g * flag(t < problem.length)  # what lies behind is another row's, or nobody's
            direct = g if problem.residual else zero
            if problem.silu:
                y = start
                for value, w in zip(read, weights, strict=True):
                    y = y + value * w
                share = 1.0 / (1.0 + jnp.exp2(-LOG2E * y))
                g = g * (share * (1.0 + y * (1.0 - share)))
            counted = g * flag(t < end)
            added = [counted * value for value in read] + [counted] * problem.bias
            totals = tuple(total + value for total, value in zip(totals, added, strict=True))
            grads = [direct, *partial]
            for lag, w in zip(lags, weights, strict=True):
                grads[lag] = grads[lag] + masked(g * w, lag)

            @pl.when((t - longest >= first) & (t - longest < end))
            def _():
                store(ref.dx.at[batch, t - longest, channels], grads[longest].astype(dtype))

            return (current, *window[:-1]), tuple(grads[:-1]), totals

        def tile(k, slot, carry):
            def tokens(j, carry):
                for u in range(unroll):
                    i = j * unroll + u
                    carry = token(slot, i, first + k * TILE + i, carry)
                return carry

            return lax.fori_loop(0, TILE // unroll, tokens, carry)

        tiles.begin()
        weights = [load(ref.weight.at[i, channels]) for i in range(len(lags))]
        zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        start = load(ref.bias.at[channels]) if problem.bias else zero
        before = lambda i: load(ref.x.at[batch, jnp.maximum(first - i, 0), channels]) * flag(first >= i)
        carry = tuple(before(i) for i in range(1, longest + 1)), (zero,) * longest, (zero,) * sums_of
        *_, totals = tiles.fold(tile, carry)
        for i, total in enumerate(totals):
            store(ref.sums.at[batch, part, i, channels], total)

    shape = jax.ShapeDtypeStruct
    outputs = {
        'dx': shape((problem.batch, problem.length, problem.channels), dtype),
        'sums': shape((problem.batch, problem.slices, sums_of, problem.channels), jnp.float32),
    }
    scratch = mosaic.slots(TILE, {'x': ((width,), dtype), 'dy': ((width,), dtype), 'reach': ((), jnp.int32)})
    grid = {'batch': problem.batch, 'slice': problem.slices, 'channels': problem.channels // width}
    return mosaic.launch('causal_conv1d_backward', body, inputs, outputs, scratch, grid, interpret)
