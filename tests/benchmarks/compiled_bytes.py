"""Bytes that scan, convolution and gains move on a GPU, counted from modules compiled for an H100 that is not there.

`python -m tests.benchmarks.compiled_bytes` prints kernels' launches and operands' and results' bytes next to the least
that any implementation moves: every input read and every output written once. JAX_PLATFORMS=cpu, extra `plan`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.adaptive_gain import diagonal_gain, matrix_gain
from kernels_pallas.causal_conv1d import causal_conv1d
from kernels_pallas.causal_conv1d import mosaic_gpu as conv_mosaic
from mixcon_jax import config as configs
from mixcon_jax.models import kinds
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters
from mixcon_jax.planning import hlo
from mixcon_jax.planning.compiling import compile_for, devices

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
    kernels = hlo.kernels(compiled.as_text())
    moved, launches = sum(kernel.total for kernel in kernels), sum(kernel.count for kernel in kernels)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    needed = f'{necessary / GIB:11.2f}{moved / necessary:8.2f}' if necessary else ' ' * 19
    figures = f'{launches:9}{moved / GIB:10.2f}{needed}{temporary / MIB:10.0f}'
    print(f'{name:44}{figures}', flush=True)
    if verbose:
        print(hlo.summary(kernels, 16 * MIB))


def conv_cases(batch: int, length: int, channels: int) -> dict[str, tuple[Callable, tuple, int]]:
    x, positions = Shape((batch, length, channels), jnp.bfloat16), Shape((batch, length), jnp.int32)
    weight, bias = Shape((4, channels), jnp.float32), Shape((channels,), jnp.float32)

    one = 2 * batch * length * channels
    wide = Shape(x.shape, jnp.float32)
    cases = {}
    for implementation in ('xla', 'mosaic_gpu'):

        def short(x, weight, bias, positions, implementation=implementation):
            options = {'activation': 'silu', 'implementation': implementation}
            return causal_conv1d(x, weight, bias, positions=positions, **options)[0]

        def taps(x, weight, positions, implementation=implementation):
            options = {'lags': (1, 2, 4, 8), 'residual': True, 'implementation': implementation}
            return causal_conv1d(x, weight, positions=positions, **options)[0]

        name = f'{channels} channels, {implementation}'
        if implementation == 'xla':
            cases[f'SiLU, bf16, {channels} channels'] = short, (x, weight, bias, positions), 2 * one
            cases[f'taps, float32, {channels} channels'] = taps, (wide, weight, positions), 4 * one
        cases[f'gradient of SiLU, {name}'] = gradient(short, 3), (x, x, weight, bias, positions), 3 * one
        cases[f'gradient of taps, {name}'] = gradient(taps, 2), (wide, wide, weight, positions), 6 * one
    return cases


def gain_cases(batch: int, length: int, heads: int, width: int) -> dict[str, tuple[Callable, tuple, int]]:
    e = Shape((batch, length, heads, width), jnp.float32)
    alpha, reset = Shape((batch, length, heads), jnp.float32), Shape((batch, length), jnp.bool_)
    one, small = 4 * batch * length * heads * width, 4 * batch * length * heads
    cases = {}
    for name, gain, options in (
        ('matrix, chunks of 32 in XLA', matrix_gain, {'implementation': 'chunked'}),
        ('matrix, chunks of 64 in XLA', matrix_gain, {'implementation': 'chunked', 'chunk': 64}),
        ('matrix, default', matrix_gain, {}),
        ('diagonal in XLA', diagonal_gain, {'implementation': 'chunked'}),
        ('diagonal by its kernel', diagonal_gain, {'implementation': 'mosaic_gpu'}),
    ):
        forward = lambda e, alpha, decay, reset, gain=gain, options=options: gain(
            e, alpha, decay, reset=reset, **options
        )[0]
        cases[name] = (forward, (e, alpha, alpha, reset), 2 * one + 2 * small)
        both = gradient(forward, 3)
        # e and dy read, y and de written, and e read once more: the backward pass begins where the forward one ends.
        cases[f'  {name}, with gradient'] = (both, (e, e, alpha, alpha, reset), 5 * one + 6 * small)
    return cases


def layer(mixer: str, batch: int, length: int, dim: int, backward: bool = True, **ssm: Any) -> tuple[Callable, tuple]:
    """A layer in bfloat16 and the shapes of its arguments.

    Args:
      mixer: its name.
      batch, length, dim: of its input.
      backward: the function returns the output, the gradients of parameters and input, and what the layer reports, not
        the output alone.
      ssm: options of `config.model.ssm`.
    """
    config = configs.default()
    config.model.dim, config.model.dtype = dim, 'bfloat16'
    config.model.ssm.update(ssm)
    config.model.hyena.max_len = length  # filters as long as the row
    model = configs.validate(config).model
    graphdef, params = nnx.split(nnx.eval_shape(lambda: kinds.load(mixer)(model, Parameters(None), 4)), nnx.Param)

    def forward(params, x, positions, segment_ids):
        y, _, aux = nnx.merge(graphdef, params)(x, Context(segment_ids=segment_ids, positions=positions), None)
        return y, aux

    def both(params, x, dy, positions, segment_ids):
        y, vjp, aux = jax.vjp(lambda params, x: forward(params, x, positions, segment_ids), params, x, has_aux=True)
        y, dy = jax.lax.optimization_barrier((y, dy))  # as in a model, where the gradient comes after the forward pass
        return y, vjp(dy), aux

    x, tokens = Shape((batch, length, dim), jnp.bfloat16), Shape((batch, length), jnp.int32)
    inference = lambda *args: forward(*args)[0]
    return (both, (params, x, x, tokens, tokens)) if backward else (inference, (params, x, tokens, tokens))


def scan_figures(target: str, mixer: str, batch: int, length: int, dim: int, backward: bool) -> dict:
    """What a layer's selective-scan kernels take and return.

    Returns:
      `kernels`, bytes of operands and results by name; `floor`, the bytes of the arrays [B, T, D] alone, each once a
      pass: forward u, dt, y, backward u, dt, dy, du, ddt, with a gate in the kernel (Mamba) also z, and z, dz;
      `largest`, the elements of the module's largest array, and `states`, how many [B, T, D, N] would have; `peak`, the
      bytes of memory that the layer needs.
    """
    function, args = layer(mixer, batch, length, dim, backward)
    compiled = compile_for(devices(target)[0], function, *args)
    text = compiled.as_text()
    ours = re.compile(r'selective_scan_\w+')
    found = [(ours.search(k.operation), k.total) for k in hlo.kernels(text) if k.kind.startswith('mosaic_gpu')]
    options = configs.default().model.ssm
    tokens, gate = batch * length * options.expand * dim, mixer == 'mamba'
    return {
        'kernels': {name[0]: size for name, size in found if name},
        'floor': 2 * tokens * (3 + gate + backward * (5 + 2 * gate)),
        'largest': hlo.largest(text),
        'states': tokens * options.d_state,
        'peak': compiled.memory_analysis().peak_memory_in_bytes,
    }


def report_scans(target: str, batch: int, length: int, dim: int) -> None:
    """The selective scan's kernels as layers call them."""
    print(f'{"selective scan of a layer":44}{"GiB":>10}{"necessary":>11}{"ratio":>8}')
    for mixer in ('mamba', 'conba'):
        for backward in (False, True):
            figures = scan_figures(target, mixer, batch, length, dim, backward)
            moved, floor = sum(figures['kernels'].values()), figures['floor']
            name = f'{mixer}, {"forward and backward" if backward else "inference"}'
            print(f'{name:44}{moved / GIB:10.2f}{floor / GIB:11.2f}{moved / floor:8.3f}')
            for kernel, size in figures['kernels'].items():
                print(f'  {kernel:42}{size / GIB:10.2f}', flush=True)


GROUPS = {
    'selective scan': r'selective_scan_\w+',
    'adaptive gain': r'adaptive_gain_\w+',
    "convolution's gradient": r'causal_conv1d_backward',
}
REST = 'the rest: elementwise and sums'


def layer_groups(target: str, mixer: str, batch: int, length: int, dim: int) -> dict[str, tuple[int, int]]:
    """Launches and bytes of a layer, forward and backward, by what they are for: products, our kernels, the rest."""
    function, args = layer(mixer, batch, length, dim)
    found = dict.fromkeys(('products', *GROUPS, REST), (0, 0))
    for kernel in hlo.kernels(compile_for(devices(target)[0], function, *args).as_text()):
        ours = kernel.kind.startswith('mosaic_gpu')
        names = [name for name, pattern in GROUPS.items() if ours and re.search(pattern, kernel.operation)]
        name = names[0] if names else 'products' if kernel.flops else REST
        launches, moved = found[name]
        found[name] = launches + kernel.count, moved + kernel.total
    return found


def report_layers(target: str, batch: int, length: int, dim: int, verbose: bool) -> None:
    """Whole layers, and what their bytes are for; with the convolution's gradient by XLA; nothing is necessary."""
    for mixer in ('mamba', 'conba'):
        for kernel in (True, False):
            function, args = layer(mixer, batch, length, dim)
            reason = conv_mosaic.unsupported if kernel else lambda *_: 'not wanted'
            with mock.patch.object(conv_mosaic, 'unsupported', reason):
                report(
                    target,
                    f'{mixer} layer, convolution by {"its kernel" if kernel else "XLA"}',
                    function,
                    args,
                    0,
                    verbose,
                )
            for name, (launches, moved) in layer_groups(target, mixer, batch, length, dim).items() if kernel else ():
                print(f'  {name:42}{launches:9}{moved / GIB:10.2f}', flush=True)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (('batch', 8), ('length', 4096), ('width', 32)):
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--channels', type=int, nargs='+', default=[4096, 8192])
    parser.add_argument('--target', default='h100')
    parser.add_argument('--only', choices=('scan', 'conv', 'gain', 'layers'))
    parser.add_argument('--verbose', action='store_true', help='list the kernels that move 16 MiB or more')
    args = parser.parse_args(arguments)
    if args.only in (None, 'scan'):
        report_scans(args.target, args.batch, args.length, args.channels[0] // 2)
    if args.only == 'scan':
        return
    cases: dict[str, tuple[Callable, tuple, int]] = {}
    if args.only in (None, 'conv'):
        for channels in args.channels:
            cases |= conv_cases(args.batch, args.length, channels)
    if args.only in (None, 'gain'):
        cases |= gain_cases(args.batch, args.length, args.channels[-1] // args.width, args.width)
    print(f'compiled for {args.target}: B{args.batch} T{args.length}, gains of {args.channels[-1]} channels')
    print(f'{"":44}{"launches":>9}{"GiB":>10}{"necessary":>11}{"ratio":>8}{"temp MiB":>10}')
    for name, (function, shapes, necessary) in cases.items():
        report(args.target, name, function, shapes, necessary, args.verbose)
    if args.only in (None, 'layers'):
        report_layers(args.target, args.batch, args.length, args.channels[0] // 2, args.verbose)


if __name__ == '__main__':
    main(sys.argv[1:])
