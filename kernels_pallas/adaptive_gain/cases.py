"""What the gains' GPU kernels are verified and timed by; the oracle is the law, token by token, in float64."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.adaptive_gain import diagonal_gain, diagonal_mosaic_gpu, matrix_gain, mosaic_gpu
from kernels_pallas.cases import Arrays, Case, Outputs, Timed, random_starts


def draw(batch: int, length: int, heads: int, width: int, initial: tuple[int, ...] | None = None) -> Arrays:
    """Errors, steps, decays and, with the shape of a head's, a gain to start from, float32."""
    keys = jax.random.split(jax.random.key(batch + length + heads + width), 4)
    arrays = {
        'e': 2 * jax.random.normal(keys[0], (batch, length, heads, width)),
        'alpha': jax.nn.sigmoid(jax.random.normal(keys[1], (batch, length, heads)) - 1),
        'log_decay': -jax.nn.softplus(jax.random.normal(keys[2], (batch, length, heads)) - 3),
    }
    if initial is not None:
        arrays['initial_gain'] = jax.random.normal(keys[3], (batch, heads, *initial))
    return arrays


def case(batch: int, length: int, heads: int, width: int, resets: float = 0.0, small: bool = False) -> Case:
    """Of the matrix gain."""
    run = functools.partial(_case, mosaic_gpu, mosaic_gpu.matrix, matrix_gain, (width, width), '')
    return run(batch, length, heads, width, resets, small)


def diagonal(
    batch: int, length: int, heads: int, width: int, resets: float = 0.0, small: bool = False, segments: int = 0
) -> Case:
    """Of the diagonal gain, its time cut as by default or into so many segments."""
    kernel = functools.partial(diagonal_mosaic_gpu.diagonal, segments=segments or None)
    name = f'diagonal, {segments} segments, ' if segments else 'diagonal '
    run = functools.partial(_case, diagonal_mosaic_gpu, kernel, diagonal_gain, (width,), name)
    return run(batch, length, heads, width, resets, small)


def _case(
    module: Any,
    function: Callable[..., Outputs],
    entry: Callable[..., Outputs],
    initial: tuple[int, ...],
    prefix: str,
    batch: int,
    length: int,
    heads: int,
    width: int,
    resets: float,
    small: bool,
) -> Case:
    reset = random_starts(resets, batch, length)

    def kernel(arrays: Arrays, interpret: Any) -> Outputs:
        given = arrays['e'], arrays['alpha'], arrays['log_decay']
        return function(*given, reset, arrays['initial_gain'], interpret=interpret)

    def oracle(arrays: Arrays) -> Outputs:
        return entry(**arrays, reset=reset, implementation='reference')

    name = f'{prefix}{batch}x{length}x{heads}x{width}' + (' resets' if resets else '')
    drawn = functools.partial(draw, batch, length, heads, width, initial)
    refusal = lambda: module.unsupported(jnp.float32, width)
    return Case(module.variants(width)[0], name, drawn, kernel, oracle, refusal, small)


CASES = [
    case(1, 11, 3, 16, 0.2, small=True),
    case(2, 301, 8, 16, 0.02),
    case(1, 1, 5, 16),
    case(3, 96, 6, 16),
    case(3, 41, 4, 16, 0.05),  # tiles of one run of bytes, as in 2x257x3x32
    case(2, 512, 8, 32, 0.01),
    case(2, 257, 3, 32),
    case(1, 1, 4, 32),
    case(1, 33, 2, 32, 0.2),
    # Tiles of one run of bytes: those of one block of heads (8 of 16 channels, else 4) and several rows.
    diagonal(1, 21, 3, 16, 0.2, small=True),
    diagonal(2, 301, 16, 16, 0.02),
    diagonal(1, 1, 5, 16),
    diagonal(3, 41, 8, 16, 0.05),
    diagonal(2, 700, 9, 16, 0.01, segments=5),
    diagonal(1, 37, 2, 32, 0.2, small=True, segments=2),
    diagonal(2, 512, 8, 32, 0.01),
    diagonal(2, 257, 3, 32),
    diagonal(1, 1, 4, 32),
    diagonal(1, 4099, 1, 32, 0.002),  # 32 segments
    diagonal(16, 300, 48, 32, 0.01),  # one
    diagonal(1, 19, 1, 64, 0.2, small=True),
    diagonal(2, 513, 6, 64, 0.01),
    diagonal(2, 333, 4, 64, segments=3),
]


def timed(batch: int, length: int, heads: int, width: int) -> Timed:
    """Of the matrix gain."""
    return _timed(f'width{width}', '', mosaic_gpu.matrix, matrix_gain, (width, width), batch, length, heads, width)


def timed_diagonal(batch: int, length: int, heads: int, width: int) -> Timed:
    (variant,) = diagonal_mosaic_gpu.variants(width)
    functions = diagonal_mosaic_gpu.diagonal, diagonal_gain
    return _timed(variant, 'diagonal ', *functions, (width,), batch, length, heads, width)


def _timed(
    variant: str,
    prefix: str,
    function: Callable[..., Outputs],
    entry: Callable[..., Outputs],
    initial: tuple[int, ...],
    batch: int,
    length: int,
    heads: int,
    width: int,
) -> Timed:
    drawn = functools.partial(draw, batch, length, heads, width)

    def kernel(arrays: Arrays) -> jax.Array:
        gain = jnp.zeros((batch, heads, *initial))
        return function(arrays['e'], arrays['alpha'], arrays['log_decay'], None, gain)[0]

    other = lambda arrays: entry(**arrays, implementation='chunked')[0]
    # Forward: e and r of `width` numbers, two steps; backward: e, dr and de, the steps and their gradients.
    pairs = batch * length * heads
    forward, both = pairs * (8 * width + 8), pairs * (20 * width + 24)
    name = f'{prefix}B{batch} T{length} H{heads} P{width} float32'
    return Timed(variant, name, drawn, kernel, other, forward, both)


TIMED = [
    timed(16, 2048, 48, 32),
    timed(8, 4096, 256, 32),
    timed_diagonal(16, 2048, 48, 32),
    timed_diagonal(8, 4096, 256, 32),
    timed_diagonal(1, 4096, 48, 32),
]
