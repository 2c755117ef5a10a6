"""The scan with a scaled readout, compiled for an H100 that is not there: registers, spills, tensor cores, barriers.

Nothing runs. A process of its own compiles (`python -m tests.gpu.test_scaled_scan bfloat16 4096 1`): LLVM may abort it.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.gpu import sass

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ('forward', 'backward')
# Type, tokens, and whether with gate, softplus, skip and resets; not whole tiles of tokens, too.
FORMS = [
    ('bfloat16', 4096, 1),
    ('float32', 4099, 1),
    ('bfloat16', 4096, 0),
    ('float32', 4099, 0),
]
# KiB of shared memory, and registers: four blocks a multiprocessor forwards, two backwards.
SHARED = {
    ('forward', 'bfloat16'): 36,
    ('forward', 'float32'): 52,
    ('backward', 'bfloat16'): 68,
    ('backward', 'float32'): 84,
}
REGISTERS = {'forward': 128, 'backward': 255}
# Instructions of a warp: of a token in its own loop; and of the rest of a tile of 8, states replayed included.
TOKEN, TILE = {'forward': 370, 'backward': 850}, {'forward': 480, 'backward': 1540}

pytestmark = pytest.mark.slow  # of kernels compiled for an absent GPU, make test has those that run most


@pytest.fixture(scope='module', params=FORMS, ids=str)
def compiled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('dumps')
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'MOSAIC_GPU_DUMP_TO': str(folder)}
    environment |= {f'MOSAIC_GPU_DUMP_{kind}': '1' for kind in ('PTXAS', 'SASS_CTRL', 'RESOURCES')}
    environment |= {'JAX_ENABLE_COMPILATION_CACHE': 'false'}  # a program from the cache dumps nothing
    command = [sys.executable, '-m', 'tests.gpu.test_scaled_scan', *map(str, request.param)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param[0], {name: sass.read(folder, f'scaled_scan_{name}') for name in KERNELS}


@pytest.mark.parametrize('name', KERNELS)
def test_kernel_spills_nothing_and_keeps_below_its_ceilings(compiled, name):
    dtype, kernels = compiled
    kernel = kernels[name]
    loops = sorted(
        (loop for loop in kernel.loops if loop.count() > 100 and not loop.count('EXIT')), key=sass.Loop.count
    )
    *replay, steps, tile = loops[: 2 if name == 'forward' else 3]
    tokens = 1 if name == 'forward' else 2
    beside = tile.count() - steps.count() + sum(2 * loop.count() for loop in replay)
    print(
        f'{name} {dtype}: {kernel.registers} registers, {kernel.shared_bytes / 1024:.0f} KiB shared,'
        f' {steps.count() / tokens:.0f} instructions a token and {beside} a tile, of special functions'
        f' {steps.count("MUFU") / tokens:.0f} and {tile.count("MUFU") - steps.count("MUFU")}'
    )
    assert kernel.spilled_bytes == 0 and kernel.registers <= REGISTERS[name]
    assert kernel.shared_bytes <= SHARED[name, dtype] * 1024
    assert steps.count() <= TOKEN[name] * tokens and beside <= TILE[name]
    assert not any(opcode.startswith(('LDL', 'STL', 'ATOM', 'RED.')) for opcode in kernel.opcodes)


@pytest.mark.parametrize('name', KERNELS)
def test_products_are_of_the_tensor_cores(compiled, name):
    """Of 32 channels, 16 states and three parts: 12 a product; the gradient of Z takes what it needs turned round."""
    kernel = compiled[1][name]
    products, tokens = (1, 1) if name == 'forward' else (3, 2)
    matrices = {opcode: n for opcode, n in kernel.opcodes.items() if opcode.startswith(('HMMA', 'MOVM', 'F2F.'))}
    assert matrices.pop('HMMA.16816.F32.BF16') == 12 * products * tokens
    assert sum(matrices.values()) == (32 * tokens if name == 'backward' else 0)  # and conversions are by pairs


@pytest.mark.parametrize('name', KERNELS)
def test_every_barrier_stands_around_a_tile(compiled, name):
    """What the interpreter, for which a block is one thread, cannot see. One less is a race.

    Before a tile is fetched over the last; between a tile's phases; before results are sent; forwards before they are
    sent again, backwards before sums over warps and before the last sums are read; and Mosaic's own around waits for
    the copy engine.
    """
    kernel = compiled[1][name]
    count = lambda counts: sum(n for opcode, n in counts.items() if opcode.startswith('BAR'))
    assert count(kernel.opcodes) == {'forward': 7, 'backward': 8}[name]
    assert all(not count(loop.opcodes) for loop in kernel.inner)


def main(dtype: str, tokens: str, full: str) -> None:
    import jax
    import jax.numpy as jnp

    from kernels_pallas.selective_scan import scaled_mosaic_gpu
    from mixcon_jax.planning import compiling

    batch, channels, states = 8, 4096, 16
    number = lambda *shape, kind=jnp.float32: jax.ShapeDtypeStruct(shape, kind)
    by_token = number(batch, int(tokens), channels, kind=dtype)
    maps = number(batch, int(tokens), states)
    arrays = {'u': by_token, 'dt': by_token, 'A': number(channels, states), 'B': maps, 'C': maps}
    arrays |= {'Z': number(states, states), 'g': number(states)}
    if whole := bool(int(full)):
        arrays |= {'D': number(channels), 'z': by_token, 'dt_bias': number(channels)}

    def gradient(arrays, reset, dy):
        run = lambda arrays: scaled_mosaic_gpu.scan(**arrays, dt_softplus=whole, reset=reset if whole else None)[0]
        y, pull = jax.vjp(run, arrays)
        return y, pull(dy)

    device = compiling.devices('h100')[0]
    compiling.compile_for(device, gradient, arrays, number(batch, int(tokens), kind=bool), by_token)


if __name__ == '__main__':
    main(*sys.argv[1:])
