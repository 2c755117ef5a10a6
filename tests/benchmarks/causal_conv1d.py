"""The short convolution with SiLU and its gradient, each implementation against the bytes it must move.

`python -m tests.benchmarks.causal_conv1d`, at sizes that suit the device; a copy of x tells the bandwidth.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas import platform
from kernels_pallas.causal_conv1d import causal_conv1d
from tests.benchmarks.timing import compare, table, worst_error

BASELINE = 'copy of x'


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = platform.platform() == 'gpu'
    small = {'batch': 4, 'length': 512, 'channels': 256, 'width': 4, 'repeats': 9}
    sizes = {'batch': 8, 'length': 4096, 'channels': 8192, 'width': 4, 'repeats': 9} if gpu else small
    for name, value in sizes.items():
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args(arguments)
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (args.batch, args.length, args.channels)
    dtype = jnp.bfloat16 if gpu else jnp.float32
    x, dy = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    weight, bias = jax.random.normal(keys[2], (args.width, args.channels)), jax.random.normal(keys[3], (args.channels,))
    positions = jnp.broadcast_to(jnp.arange(args.length, dtype=jnp.int32) % 1000, shape[:2])

    def conv(x, weight, bias, implementation):
        places = positions[: x.shape[0], : x.shape[1]]
        options = {'activation': 'silu', 'positions': places, 'implementation': implementation}
        return causal_conv1d(x, weight, bias, **options)[0]

    def gradient(implementation):
        def run(dy, *args):
            return jax.vjp(lambda *args: conv(*args, implementation), *args)[1](dy)

        return run

    inputs = x, weight, bias
    cases = {BASELINE: (lambda x: x + 1, (x,)), 'forward': (lambda *args: conv(*args, None), inputs)}
    for implementation in ('xla', 'mosaic_gpu') if gpu else ('xla',):
        cases[f'gradient, {implementation}'] = gradient(implementation), (dy, *inputs)
    first = jax.tree.map(lambda x: x[:1, :300], (dy, x)) + inputs[1:]  # no multiple of a tile
    exact = jax.jit(gradient('reference'))(*(value.astype(jnp.float32) for value in first))
    error = worst_error(jax.jit(gradient(None))(*first), exact)
    print(f'gradients within {error:.1e} of the sequential form in float32')
    print('short convolution with SiLU:', ', '.join(f'{name} {getattr(args, name)}' for name in sizes))
    timings = compare(cases, args.repeats)
    print(table(timings, BASELINE))
    print('least possible, copy = 1: forward 1, gradient 1.5')
    for name, timing in timings.items():
        print(f'{name}: {timing.best / timings[BASELINE].best:.2f} times the copy')


if __name__ == '__main__':
    main(sys.argv[1:])
