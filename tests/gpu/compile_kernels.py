"""Compiles every variant of the GPU kernels for a GPU that is absent, and reads registers, spills and instructions.

`python -m tests.gpu.compile_kernels h100` prints a table; tests read it as JSON (`--json`). One process a GPU model: a
compiler that fails may take its process along, dumps are asked for by environment variables, and Mosaic mixes up two
models that it compiles for in one process.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Variant:
    """A kernel at B8 T4096 D4096: which, how many states, and the options that it is compiled with."""

    kernel: str  # forward, inference, carry, cocarry or backward
    states: int = 16
    dtype: str = 'bfloat16'
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return '-'.join([self.kernel, f'N{self.states}', self.dtype, *(k for k, v in self.options.items() if v)])


FULL = {'gate': True, 'softplus': True, 'reset': True}
VARIANTS = [
    *(Variant(kernel, options=FULL) for kernel in ('forward', 'inference', 'carry', 'cocarry', 'backward')),
    *(Variant(kernel, options={}) for kernel in ('forward', 'backward')),
    *(Variant(kernel, states, options=FULL) for kernel in ('forward', 'backward') for states in (8, 24, 32, 64)),
    *(Variant(kernel, dtype='float32', options=FULL) for kernel in ('forward', 'backward')),
    *(Variant('backward', states, 'float32', FULL) for states in (32, 48, 56, 64)),  # take the most shared memory
    Variant('backward', dtype='float32', options=FULL | {'readout': True}),
    *(Variant(kernel, options=FULL | {'readout': True}) for kernel in ('forward', 'backward')),
    *(Variant(kernel, options={'softplus': True, 'reset': True, 'prior': True}) for kernel in ('forward', 'backward')),
]


def compile_here(target: str, names: list[str]) -> dict[str, dict]:
    """Every variant's figures, by name; to be called in a process of its own."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.selective_scan.mosaic_gpu import forward as _  # noqa: F401  the package before its modules
    from kernels_pallas.selective_scan.mosaic_gpu import tuning
    from kernels_pallas.selective_scan.mosaic_gpu.tiles import FLOAT, Problem
    from mixcon_jax.planning.compiling import compile_for, devices
    from tests.gpu import sass

    forward = sys.modules['kernels_pallas.selective_scan.mosaic_gpu.forward']
    backward = sys.modules['kernels_pallas.selective_scan.mosaic_gpu.backward']
    device = devices(target)[0]
    generation = 'hopper' if target == 'h100' else 'ampere'
    folder = pathlib.Path(os.environ['MOSAIC_GPU_DUMP_TO'])
    number = lambda *shape: jax.ShapeDtypeStruct(shape, FLOAT)
    found = {}
    for variant in VARIANTS:
        if names and str(variant) not in names:
            continue
        dtype = jnp.dtype(variant.dtype)
        options = dict.fromkeys(('gate', 'softplus', 'reset', 'readout', 'prior'), False) | variant.options
        p = Problem(8, 4096, 4096, variant.states, dtype, tma=generation == 'hopper', **options)
        chosen = tuning.settings(generation, p.states, dtype.itemsize, p.readout)
        back = variant.kernel == 'backward'
        axes = p.warp_axes if back else p.axes
        args = {name: p.tokens(axes) for name in ('u', 'dt', 'dy', 'z')}
        mapped = 'C' if variant.kernel == 'cocarry' else 'B'  # brings the resets along
        args |= {name: number(8, 4096, p.columns if name == mapped else p.states) for name in ('B', 'C')}
        args |= {'A': number(*axes, p.states), 'D': number(*axes), 'bias': number(*axes)}
        args |= {'state': number(8, *axes, p.states), 'dfinal': number(8, *axes, p.states)}
        args |= {'states': number(8, 4096 // chosen.backward_tile, *axes, p.states)}
        args |= {'Z': number(p.states, p.states), 'Zt': number(p.states, p.states), 'g': number(p.states)}
        unused = {'inference': ('dy', 'dfinal', 'states', 'Z'), 'forward': ('dy', 'dfinal', 'states', 'Z')}
        unused |= {'carry': ('dy', 'dfinal', 'states', 'z', 'C', 'D', 'Z', 'Zt', 'g')}
        unused |= {'cocarry': ('u', 'B', 'D', 'state', 'dfinal', 'states', 'Z', 'Zt', 'g'), 'backward': ('state',)}
        absent = {*unused[variant.kernel], *(() if p.gate else ('z',))}
        absent |= set(() if p.readout else ('Z', 'Zt', 'g')) | set(('D',) if p.prior and not back else ())
        args = {name: value for name, value in args.items() if name not in absent}
        tiles = {'tile': chosen.forward_tile, 'unroll': chosen.unroll}
        run = {
            'forward': functools.partial(forward.forward, p, **tiles, checkpoint=chosen.backward_tile),
            'inference': functools.partial(forward.forward, p, **tiles),
            'carry': functools.partial(forward.forward, p, **tiles, read=False),
            'cocarry': functools.partial(forward.cocarry, p, **tiles),
            'backward': functools.partial(backward.backward, p, tile=chosen.backward_tile, stretch=chosen.stretch),
        }[variant.kernel]
        for dump in folder.iterdir():
            dump.unlink()
        compile_for(device, run, args)
        (report,) = folder.glob('*.ptxas')
        kernel = sass.read(folder, report.name.rsplit('_', 1)[0])
        found[str(variant)] = _figures(kernel, variant, chosen)
    return found


def _figures(kernel: Any, variant: Variant, chosen: Any) -> dict:
    """What the limits are about; instructions and the like for a step of a warp."""
    figures = {
        'registers': kernel.registers,
        'spilled': kernel.spilled_bytes,
        'shared_kib': kernel.shared_bytes / 1024,
        'barriers': sum(n for op, n in kernel.opcodes.items() if op.startswith('BAR')),
        'atomics': sum(n for op, n in kernel.opcodes.items() if op.startswith(('ATOM', 'RED.'))),
    }
    if variant.options.get('readout'):
        return figures  # its steps have loops of their own
    inner = sorted(kernel.inner, key=lambda loop: loop.count())
    if variant.kernel == 'backward':
        replay, back = inner[0], inner[-1]
        whole = max(kernel.loops, key=lambda loop: loop.count())  # a tile of time; both others are in it once
        stretches, steps = chosen.backward_tile // chosen.stretch, chosen.backward_tile
        count = lambda *ops: (
            whole.count(*ops) + (stretches - 2) * replay.count(*ops) + (stretches - 1) * back.count(*ops)
        )  # fmt: skip
        figures['step_barriers'] = replay.count('BAR') + back.count('BAR')
    else:
        count, steps = inner[-1].count, chosen.unroll
        figures['step_barriers'] = inner[-1].count('BAR')
        figures['vector_loads'] = inner[-1].count('LDS.128') / steps
    kinds = {'instructions': (), 'special': ('MUFU',), 'exponentials': ('MUFU.EX2',), 'shuffles': ('SHFL',)}
    return figures | {name: count(*ops) / steps for name, ops in kinds.items()}


def compiled(target: str, names: tuple[str, ...] = ()) -> dict[str, dict]:
    """`compile_here` in a process of its own.

    Raises:
      RuntimeError: it failed; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            'JAX_PLATFORMS': 'cpu', 'MOSAIC_GPU_DUMP_TO': folder, 'MOSAIC_GPU_DUMP_PTXAS': '1',
            'MOSAIC_GPU_DUMP_SASS_CTRL': '1', 'MOSAIC_GPU_DUMP_RESOURCES': '1', 'JAX_ENABLE_COMPILATION_CACHE': 'false',
        }  # fmt: skip
        command = [sys.executable, '-m', 'tests.gpu.compile_kernels', target, *names, '--json']
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'compiling for {target} failed:\n{done.stderr[-4000:]}')
    return json.loads(done.stdout)


def table(figures: dict[str, dict]) -> str:
    """Markdown, a row a kernel."""
    columns = ['registers', 'spilled', 'shared_kib', 'instructions', 'special', 'shuffles', 'step_barriers', 'barriers']
    columns.append('atomics')
    lines = ['| kernel | ' + ' | '.join(columns) + ' |', '|---' * (len(columns) + 1) + '|']
    for name, row in figures.items():
        cells = (f'{row[column]:.4g}' if column in row else '–' for column in columns)
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('target', choices=('h100', 'a100'))
    parser.add_argument('names', nargs='*', help='variants; all when none is named')
    parser.add_argument('--json', action='store_true', help='for the tests')
    options = parser.parse_args(arguments)
    if options.json:
        print(json.dumps(compile_here(options.target, options.names)))
    else:
        print(table(compiled(options.target, tuple(options.names))))


if __name__ == '__main__':
    main(sys.argv[1:])
