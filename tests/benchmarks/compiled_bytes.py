"""Bytes that the convolution and the gains move on a GPU, counted from modules compiled for an H100 that is not there.

`python -m tests.benchmarks compiled_bytes` prints kernels' launches and operands' and results' bytes next to the least
that any implementation moves: every input read and every output written once. JAX_PLATFORMS=cpu, extra `plan`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.adaptive_gain import diagonal_gain, matrix_gain
from kernels_pallas.causal_conv1d import causal_conv1d
from mixcon_jax.planning.targets import compile_for, devices
from tests.benchmarks import hlo_bytes

Shape = jax.ShapeDtypeStruct
MIB, GIB = 2**20, 2**30


def gradient(function: Callable, arguments: int) -> Callable:
    """`(dy, *args) -> gradients of the first arguments`, forward pass included as far as they need it."""

    def run(dy, *args):
        y, vjp = jax.vjp(lambda *first: function(*first, *args[arguments:]), *args[:arguments])
        return vjp(dy.astype(y.dtype))

    return run


def report(target: str, name: str, function: Callable, args: Sequence, necessary: int, verbose: bool) -> None:
    """One line: launches, bytes moved, the necessary ones, their ratio, temporaries."""
    compiled = compile_for(devices(target)[0], function, *args)
    kernels = hlo_bytes.kernels(compiled.as_text())
    moved, launches = sum(kernel.total for kernel in kernels), sum(kernel.count for kernel in kernels)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    figures = f'{launches:9}{moved / GIB:10.2f}{necessary / GIB:11.2f}{moved / necessary:8.2f}{temporary / MIB:10.0f}'
    print(f'{name:44}{figures}', flush=True)
    if verbose:
        print(hlo_bytes.summary(kernels, 16 * MIB))


def conv_cases(batch: int, length: int, channels: int) -> dict[str, tuple[Callable, tuple, int]]:
    x, positions = Shape((batch, length, channels), jnp.bfloat16), Shape((batch, length), jnp.int32)
    weight, bias = Shape((4, channels), jnp.float32), Shape((channels,), jnp.float32)

    def short(x, weight, bias, positions):
        return causal_conv1d(x, weight, bias, positions=positions, activation='silu')[0]

    def taps(x, weight, positions):
        return causal_conv1d(x, weight, positions=positions, lags=(1, 2, 4, 8), residual=True)[0]

    one = 2 * batch * length * channels
    wide = Shape(x.shape, jnp.float32)
    name = f'{channels} channels'
    return {
        f'width 4 + SiLU, bf16, {name}': (short, (x, weight, bias, positions), 2 * one),
        f'  gradient, {name}': (gradient(short, 3), (x, x, weight, bias, positions), 3 * one),
        f'taps 1, 2, 4, 8, float32, {name}': (taps, (wide, weight, positions), 4 * one),
        f'  gradient of taps, {name}': (gradient(taps, 2), (wide, wide, weight, positions), 6 * one),
    }


def gain_cases(batch: int, length: int, heads: int, width: int) -> dict[str, tuple[Callable, tuple, int]]:
    e = Shape((batch, length, heads, width), jnp.float32)
    alpha, reset = Shape((batch, length, heads), jnp.float32), Shape((batch, length), jnp.bool_)
    one, small = 4 * batch * length * heads * width, 4 * batch * length * heads
    cases = {}
    for name, gain, options in (
        ('matrix, chunks of 32 in XLA', matrix_gain, {'implementation': 'chunked'}),
        ('matrix, chunks of 64 in XLA', matrix_gain, {'implementation': 'chunked', 'chunk': 64}),
        ('matrix, default', matrix_gain, {}),
        ('diagonal', diagonal_gain, {}),
    ):
        forward = lambda e, alpha, decay, reset, gain=gain, options=options: gain(
            e, alpha, decay, reset=reset, **options
        )[0]
        cases[name] = (forward, (e, alpha, alpha, reset), 2 * one + 2 * small)
        both = gradient(forward, 3)
        # e and dy read, y and de written, and e read once more: the backward pass begins where the forward one ends.
        cases[f'  {name}, with gradient'] = (both, (e, e, alpha, alpha, reset), 5 * one + 6 * small)
    return cases


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (('batch', 8), ('length', 4096), ('width', 32)):
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--channels', type=int, nargs='+', default=[4096, 8192])
    parser.add_argument('--target', default='h100')
    parser.add_argument('--only', choices=('conv', 'gain'))
    parser.add_argument('--verbose', action='store_true', help='list the kernels that move 16 MiB or more')
    args = parser.parse_args(arguments)
    cases: dict[str, tuple[Callable, tuple, int]] = {}
    if args.only != 'gain':
        for channels in args.channels:
            cases |= conv_cases(args.batch, args.length, channels)
    if args.only != 'conv':
        cases |= gain_cases(args.batch, args.length, args.channels[-1] // args.width, args.width)
    print(f'compiled for {args.target}: B{args.batch} T{args.length}, gains of {args.channels[-1]} channels')
    print(f'{"":44}{"launches":>9}{"GiB":>10}{"necessary":>11}{"ratio":>8}{"temp MiB":>10}')
    for name, (function, shapes, necessary) in cases.items():
        report(args.target, name, function, shapes, necessary, args.verbose)


if __name__ == '__main__':
    main(sys.argv[1:])
