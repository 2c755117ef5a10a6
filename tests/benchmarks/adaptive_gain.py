"""Adaptive gains against the selective scan they accompany, forward and backward.

`python -m tests.benchmarks.adaptive_gain` prints each gain's time next to a scan of as many channels in the same run,
at sizes that suit the device.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas import platform
from kernels_pallas.adaptive_gain import diagonal_gain, matrix_gain
from tests.benchmarks import selective_scan
from tests.benchmarks.timing import compare, table, worst_error

BASELINE = 'selective scan'


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = platform.platform() == 'gpu'
    small = {'batch': 4, 'length': 512, 'channels': 256, 'width': 32, 'repeats': 9}
    sizes = {'batch': 8, 'length': 4096, 'channels': 8192, 'width': 32, 'repeats': 5} if gpu else small
    for name, value in sizes.items():
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args(arguments)
    shape = (args.batch, args.length, args.channels // args.width)
    keys = jax.random.split(jax.random.key(0), 3)
    gain_inputs = (
        jax.random.normal(keys[0], (*shape, args.width)),
        jax.nn.sigmoid(jax.random.normal(keys[1], shape) - 2),
        -jax.nn.softplus(jax.random.normal(keys[2], shape) - 5),
    )
    reset = jax.random.bernoulli(jax.random.key(1), 0.01, shape[:2])

    def gradient(gain, **options):
        return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(gain(*args, **options)[0])), argnums=(0, 1, 2))

    scan_inputs = selective_scan.inputs(args.batch, args.length, args.channels, 16)
    cases = {
        BASELINE: (selective_scan.value_and_gradient(), scan_inputs),
        'diagonal gain': (gradient(diagonal_gain), gain_inputs),
        'diagonal gain + reset': (gradient(diagonal_gain, reset=reset), gain_inputs),
        'matrix gain + reset': (gradient(matrix_gain, reset=reset), gain_inputs),
        'matrix gain': (gradient(matrix_gain), gain_inputs),
    }
    for chunk in (32,) if gpu else (16, 32, 64):
        chunked = gradient(matrix_gain, chunk=chunk, implementation='chunked')
        cases[f'matrix gain, chunk={chunk}'] = chunked, gain_inputs
    if gpu:
        cases['matrix gain, forward only'] = lambda *args: matrix_gain(*args)[0], gain_inputs
    first = jax.tree.map(lambda x: x[:1, :300, :5], gain_inputs)  # no multiple of any tile
    with jax.default_matmul_precision('highest'):
        for gain in (matrix_gain, diagonal_gain):
            exact = jax.jit(gradient(gain, reset=reset[:1, :300], implementation='reference'))(*first)
            error = worst_error(jax.jit(gradient(gain, reset=reset[:1, :300]))(*first), exact)
            print(f'{gain.__name__}: gradients within {error:.1e} of the sequential form')
    print('adaptive gains, forward + backward:', ', '.join(f'{name} {getattr(args, name)}' for name in sizes))
    print(table(compare(cases, args.repeats), BASELINE))


if __name__ == '__main__':
    main(sys.argv[1:])
