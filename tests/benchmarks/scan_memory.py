"""Peak memory of one layer's forward and backward pass on a GPU that is not there, by sequence length.

`JAX_PLATFORMS=cpu python -m tests.benchmarks.scan_memory` compiles a Mamba and a Conba layer (one row, bfloat16) for
each implementation of the selective scan and prints what XLA's buffer assignment needs at the peak: parameters, inputs,
outputs and gradients included. It takes about ten minutes. Nothing runs. Every implementation gets a process of its
own, as LLVM may abort it. Needs the extra `plan`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
MIXERS = ('mamba', 'conba')  # those with a scan that can be chosen
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
IMPLEMENTATIONS: dict[str, dict] = {
    'default': {},
    'mosaic_gpu': {'implementation': 'mosaic_gpu'},
    'mosaic_gpu, keep_every=64': {'implementation': 'mosaic_gpu', 'keep_every': 64},
    'chunked': {'implementation': 'chunked'},
    'associative': {'implementation': 'associative'},
}
MIB = 2**20


def peak_here(target: str, mixer: str, implementation: str, length: int, dim: int) -> int:
    """Peak bytes of a layer at one length; to be called in a process with JAX_PLATFORMS=cpu."""
    from mixcon_jax.planning.compiling import compile_for, devices
    from tests.benchmarks.compiled_bytes import layer

    function, args = layer(mixer, 1, length, dim, **IMPLEMENTATIONS[implementation])
    return compile_for(devices(target)[0], function, *args).memory_analysis().peak_memory_in_bytes


def peaks(mixer: str, implementation: str, lengths: Sequence[int], dim: int = 2048, target: str = 'h100') -> list[int]:
    """Peak bytes at every length, found by a process of its own.

    If that process dies the lengths that it did not reach are missing, and what it printed is on stderr.
    """
    asked = json.dumps([target, mixer, implementation, list(lengths), dim])
    command = [sys.executable, '-m', 'tests.benchmarks.scan_memory', '--child', asked]
    # Always compiled: what comes out of a cache has no memory analysis.
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f'{mixer}, {implementation}: failed\n{done.stderr[-2000:]}', file=sys.stderr)
    return [int(line) for line in done.stdout.splitlines()]


def table(found: Mapping[str, Sequence[int]], lengths: Sequence[int]) -> str:
    """Markdown: MiB by length and implementation, and what a thousand tokens add at either end."""
    lines = ['| T | ' + ' | '.join(found) + ' |', '|---:' * (len(found) + 1) + '|']
    for i, length in enumerate(lengths):
        cells = (f'{sizes[i] / MIB:,.0f}' if i < len(sizes) else '–' for sizes in found.values())
        lines.append(f'| {length:,} | ' + ' | '.join(cells) + ' |')
    for i in sorted({0, len(lengths) - 2}):
        tokens = (lengths[i + 1] - lengths[i]) / 1000
        pairs = (sizes[i : i + 2] for sizes in found.values())
        cells = (f'{(pair[1] - pair[0]) / MIB / tokens:.1f}' if len(pair) == 2 else '–' for pair in pairs)
        lines.append(f'| 1,000 tokens more, {lengths[i]:,} to {lengths[i + 1]:,} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--dim', type=int, default=2048)
    parser.add_argument('--lengths', type=int, nargs='+', default=LENGTHS)
    parser.add_argument('--mixers', nargs='+', choices=MIXERS, default=MIXERS)
    parser.add_argument('--implementations', nargs='+', choices=IMPLEMENTATIONS, default=tuple(IMPLEMENTATIONS)[1:])
    parser.add_argument('--target', default='h100')
    parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        target, mixer, implementation, lengths, dim = args.child
        for length in lengths:
            print(peak_here(target, mixer, implementation, length, dim), flush=True)
        return
    for mixer in args.mixers:
        found = {name: peaks(mixer, name, args.lengths, args.dim, args.target) for name in args.implementations}
        print(f'{mixer} layer, B1 dim {args.dim}, bfloat16, forward + backward on {args.target}, MiB at the peak:\n')
        print(table(found, args.lengths), '\n', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
