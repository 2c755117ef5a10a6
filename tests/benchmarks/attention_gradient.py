"""Attention's gradient on a GPU by its two kernels, dq and dk with dv: `python -m tests.benchmarks.attention_gradient`.

An H200 took four times as long for dk and dv at head width 128 as their products say. The shapes come in groups of the
same work that differ in one thing, so as to tell what it hangs on: the heads of a row, and so the distance from one
row's numbers to the next row's; whether query heads share a key head; the width.

`--once` runs every shape's dk and dv once, for `ncu --kernel-name regex:attention_dkv`.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas import cases
from kernels_pallas.attention import mosaic_gpu

SHAPES = (  # rows, tokens, query heads, key heads, width
    (4, 4096, 32, 8, 128),
    (16, 4096, 8, 2, 128),
    (32, 4096, 4, 1, 128),
    (128, 4096, 1, 1, 128),
    (4, 4096, 16, 4, 128),
    (8, 4096, 16, 4, 64),
    (16, 2048, 12, 3, 64),
)
PRODUCTS = {'dq': 3, 'dk, dv': 4}  # of two operations for each pair of tokens, and number of a head


def drawn(rows: int, length: int, heads: int, kv_heads: int, width: int) -> tuple[jax.Array, ...]:
    """q, k, v, the output, its gradient, and the logsumexp."""
    keys = jax.random.split(jax.random.key(0), 5)
    counts = (heads, kv_heads, kv_heads, heads, heads)
    arrays = [jax.random.normal(key, (rows, length, n, width), jnp.bfloat16) for key, n in zip(keys, counts)]
    return *arrays, jnp.full((rows, heads, length), 9.0, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def gradient(part: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """One of the two: what nobody asks for, XLA leaves out."""
    found = mosaic_gpu.backward(*arrays, None, arrays[0].shape[-1] ** -0.5)
    return found[:1] if part == 'dq' else found[1:]


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--once', action='store_true', help='run dk and dv once, for a profiler')
    options = parser.parse_args(arguments)
    for shape in SHAPES:
        rows, length, heads, kv_heads, width = shape
        arrays, shown = drawn(*shape), f'B{rows} T{length} heads {heads}/{kv_heads} of {width}'
        if options.once:
            jax.block_until_ready(gradient('dk, dv', *arrays))
            continue
        for part, products in PRODUCTS.items():
            taken = cases.milliseconds(functools.partial(gradient, part), *arrays)
            rate = products * rows * heads * length**2 * width / taken / 1e9
            print(f'{shown:32} {part:7} {taken:7.3f} ms  {rate:5.0f} TFLOP/s', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
