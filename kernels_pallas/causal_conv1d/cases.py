"""What the convolution's gradient kernel is verified and timed by; the oracle is the shifted sum in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Arrays, Case, Outputs, Timed, random_starts
from kernels_pallas.causal_conv1d import mosaic_gpu, past_reach, xla

BF16, F32 = jnp.bfloat16, jnp.float32
WIDTH4 = (3, 2, 1, 0)


def draw(shape: tuple[int, int, int], dtype: Any, lags: tuple[int, ...], bias: bool, past: bool) -> Arrays:
    batch, _, channels = shape
    keys = jax.random.split(jax.random.key(sum(shape) + len(lags)), 4)
    arrays = {
        'x': jax.random.normal(keys[0], shape).astype(dtype),
        'weight': jax.random.normal(keys[1], (len(lags), channels)),
    }
    if bias:
        arrays['bias'] = jax.random.normal(keys[2], (channels,))
    if past:
        arrays['past'] = jax.random.normal(keys[3], (batch, max(lags), channels)).astype(dtype)
    return arrays


def case(
    shape: tuple[int, int, int],
    dtype: Any = F32,
    lags: tuple[int, ...] = WIDTH4,
    *,
    silu: bool = True,
    residual: bool = False,
    bias: bool = True,
    past: bool = False,
    resets: float = 0.0,
    small: bool = False,
) -> Case:
    """A convolution over documents that start at random, or over whole rows."""
    starts = random_starts(resets, *shape[:2])

    def reach() -> jax.Array:
        if starts is not None:
            return past_reach(starts).astype(jnp.int32)
        return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32) + (max(lags) if past else 0), shape[:2])

    def run(arrays: Arrays, gradient: Any) -> Outputs:
        given = arrays['x'], arrays['weight'], arrays.get('bias'), reach(), arrays.get('past')
        return (xla.conv(*given, lags, silu, residual, gradient),)

    kernel = lambda arrays, interpret: run(arrays, functools.partial(mosaic_gpu.gradient, interpret=interpret))
    words = ['x'.join(map(str, shape)), jnp.dtype(dtype).name, f'lags {",".join(map(str, lags))}']
    words += [name for name, on in (('residual', residual), ('past', past), ('resets', bool(resets))) if on]
    drawn = functools.partial(draw, shape, dtype, lags, bias, past)
    refusal = lambda: mosaic_gpu.unsupported(dtype, lags)
    return Case(mosaic_gpu.variants(silu)[0], ' '.join(words), drawn, kernel, lambda a: run(a, None), refusal, small)


CASES = [
    case((2, 45, 130), resets=0.1, past=True, small=True),
    case((2, 512, 256), BF16),
    case((1, 1026, 256), BF16),  # slices whose even share is no multiple of 16 bytes
    case((1, 1026, 256), resets=0.02),
    case((3, 1365, 200), BF16, resets=0.02, past=True),
    case((2, 700, 384), lags=tuple(range(7, -1, -1)), resets=0.05),
    case((1, 1, 128), lags=(1, 0), past=True),
    case((16, 2048, 1536), BF16, resets=0.002),
    case((8, 4096, 1024), BF16, bias=False),
    case((2, 37, 100), lags=(8, 1), silu=True, residual=True, bias=False),
    case((2, 700, 128), lags=(1, 2, 4, 8), silu=False, residual=True, bias=False, resets=0.05),
    case((2, 1026, 260), BF16, lags=(1, 2, 4, 8), silu=False, residual=True, bias=False, past=True),
    case((2, 20, 128), lags=WIDTH4, silu=False, resets=0.1),
]


def timed(batch: int, length: int, channels: int) -> Timed:
    """Mamba's: width 4 with SiLU, bfloat16. The forward pass is XLA's in both forms."""
    shape = (batch, length, channels)
    drawn = functools.partial(draw, shape, BF16, WIDTH4, True, False)

    def run(gradient: Any, arrays: Arrays) -> jax.Array:
        reach = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) % 1000, shape[:2])
        return xla.conv(arrays['x'], arrays['weight'], arrays['bias'], reach, None, WIDTH4, True, False, gradient)

    elements = 2 * batch * length * channels  # forward: x and y; backward: x, dy and dx
    kernel, other = functools.partial(run, mosaic_gpu.gradient), functools.partial(run, None)
    name = f'B{batch} T{length} C{channels} bfloat16'
    return Timed('silu', name, drawn, kernel, other, 2 * elements, 5 * elements)


TIMED = [timed(16, 2048, 1536), timed(8, 4096, 4096)]
