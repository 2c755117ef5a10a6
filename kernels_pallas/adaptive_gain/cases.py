"""What the matrix gain's GPU kernels are verified and timed by; the oracle is the law, token by token, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.adaptive_gain import matrix_gain, mosaic_gpu
from kernels_pallas.cases import Arrays, Case, Outputs, Timed, random_starts


def draw(batch: int, length: int, heads: int, width: int, initial: bool = True) -> Arrays:
    """Errors, steps, decays and, with `initial`, a gain to start from, float32."""
    keys = jax.random.split(jax.random.key(batch + length + heads + width), 4)
    arrays = {
        'e': 2 * jax.random.normal(keys[0], (batch, length, heads, width)),
        'alpha': jax.nn.sigmoid(jax.random.normal(keys[1], (batch, length, heads)) - 1),
        'log_decay': -jax.nn.softplus(jax.random.normal(keys[2], (batch, length, heads)) - 3),
    }
    if initial:
        arrays['initial_gain'] = jax.random.normal(keys[3], (batch, heads, width, width))
    return arrays


def case(batch: int, length: int, heads: int, width: int, resets: float = 0.0, small: bool = False) -> Case:
    reset = random_starts(resets, batch, length)

    def kernel(arrays: Arrays, interpret: Any) -> Outputs:
        given = arrays['e'], arrays['alpha'], arrays['log_decay']
        return mosaic_gpu.matrix(*given, reset, arrays['initial_gain'], interpret=interpret)

    def oracle(arrays: Arrays) -> Outputs:
        return matrix_gain(**arrays, reset=reset, implementation='reference')

    name = f'{batch}x{length}x{heads}x{width}' + (' resets' if resets else '')
    drawn = functools.partial(draw, batch, length, heads, width)
    refusal = lambda: mosaic_gpu.unsupported(jnp.float32, width)
    return Case(mosaic_gpu.variants(width)[0], name, drawn, kernel, oracle, refusal, small)


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
]


def timed(batch: int, length: int, heads: int, width: int) -> Timed:
    drawn = functools.partial(draw, batch, length, heads, width, initial=False)

    def kernel(arrays: Arrays) -> jax.Array:
        gain = jnp.zeros((batch, heads, width, width))
        return mosaic_gpu.matrix(arrays['e'], arrays['alpha'], arrays['log_decay'], None, gain)[0]

    other = lambda arrays: matrix_gain(**arrays, implementation='chunked')[0]
    # Forward: e and r of `width` numbers, two steps; backward: e, dr and de, the steps and their gradients.
    pairs = batch * length * heads
    forward, both = pairs * (8 * width + 8), pairs * (20 * width + 24)
    name = f'B{batch} T{length} H{heads} P{width} float32'
    return Timed(f'width{width}', name, drawn, kernel, other, forward, both)


TIMED = [timed(16, 2048, 48, 32), timed(8, 4096, 256, 32)]
