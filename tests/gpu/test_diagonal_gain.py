"""The diagonal gain's kernels as compiled for an H100 that is not there: registers, spills, instructions, bytes.

Nothing runs. A process of its own compiles (`python -m tests.gpu.test_diagonal_gain WIDTH`), as LLVM may abort it.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from kernels_pallas import cards
from kernels_pallas.adaptive_gain import diagonal_mosaic_gpu
from mixcon_jax.models import presets
from mixcon_jax.planning import compiling
from mixcon_jax.planning.collectives import collectives
from tests.benchmarks import compiled_bytes
from tests.benchmarks.context_parallel import layer_gradient
from tests.gpu import sass

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUMPS = ('PTXAS', 'SASS_CTRL', 'RESOURCES')
KERNELS = ('forward', 'backward', 'carry', 'cocarry')
# Registers, KiB of shared memory, instructions of a tile of 16 tokens, a channel a thread (width 64: two).
CEILINGS = {
    16: {'forward': (48, 40, 425), 'backward': (128, 56, 815), 'carry': (56, 32, 390), 'cocarry': (64, 56, 415)},
    32: {'forward': (48, 38, 435), 'backward': (128, 56, 845), 'carry': (56, 30, 400), 'cocarry': (64, 54, 425)},
    64: {'forward': (64, 70, 555), 'backward': (168, 104, 1235), 'carry': (64, 54, 515), 'cocarry': (64, 102, 540)},
}
# Of a tile's loop: one less is a race.
BARRIERS = {'forward': 4, 'backward': 5, 'carry': 3, 'cocarry': 3}


pytestmark = pytest.mark.slow  # of kernels compiled for an absent GPU, make test has those that run most


@pytest.fixture(scope='module', params=CEILINGS)
def compiled(request, tmp_path_factory):
    """The width of a head, and its four kernels."""
    folder = tmp_path_factory.mktemp('dumps')
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'MOSAIC_GPU_DUMP_TO': str(folder)}
    environment |= {f'MOSAIC_GPU_DUMP_{kind}': '1' for kind in DUMPS}
    environment |= {'JAX_ENABLE_COMPILATION_CACHE': 'false'}  # a program from the cache dumps nothing
    command = [sys.executable, '-m', 'tests.gpu.test_diagonal_gain', str(request.param)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, {name: sass.read(folder, f'diagonal_gain_{name}') for name in KERNELS}


def tile_of(kernel: sass.Kernel) -> sass.Loop:
    """The loop over tiles; the branch back from a wait's slow path, behind the kernel's end, is none."""
    (found,) = [loop for loop in kernel.loops if loop.count() > 100 and not loop.count('EXIT')]
    return found


@pytest.mark.parametrize('name', KERNELS)
def test_kernel_spills_nothing_and_keeps_below_its_ceilings(compiled, name):
    width, kernels = compiled
    kernel = kernels[name]
    tile = tile_of(kernel)
    registers, shared, instructions = CEILINGS[width][name]
    shuffles, places = tile.count('SHFL'), tile.count('LDS', 'STS')
    print(
        f'{name} {width}: {kernel.registers} registers, {kernel.shared_bytes / 1024:.0f} KiB shared,'
        f' {tile.count()} instructions, {shuffles} shuffles, {places} accesses to shared memory'
    )
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= registers
    assert kernel.shared_bytes <= shared * 1024
    assert tile.count() <= instructions


@pytest.mark.parametrize('name', KERNELS)
def test_no_atomics_and_every_barrier(compiled, name):
    """What the interpreter, for which a warpgroup is one thread, cannot see."""
    kernel = compiled[1][name]
    assert not any(opcode.startswith(('ATOM', 'RED.')) for opcode in kernel.opcodes)
    assert tile_of(kernel).count('BAR') == BARRIERS[name]


@pytest.mark.parametrize('batch, ratios', [(8, (1.1, 1.15)), (1, (1.6, 1.75))])
def test_moves_little_more_than_it_must(capsys, batch, ratios):
    """One row of few heads cuts time, and reads its arrays once more to find what segments do."""
    width = 256 if batch > 1 else 48
    found = compiled_bytes.gain_cases(batch, 4096, width, 32)
    for name, ratio in zip(('diagonal by its kernel', '  diagonal by its kernel, with gradient'), ratios, strict=True):
        function, shapes, necessary = found[name]
        compiled_bytes.report('h100', name, function, shapes, necessary, False)
        assert float(capsys.readouterr().out.split()[-2]) <= ratio


@pytest.mark.parametrize('data, shards', [(4, 1), (2, 2)])
def test_in_a_layer_every_device_computes_its_own_rows_and_tokens(monkeypatch, data, shards):
    monkeypatch.setenv(cards.TRUST, '1')
    monkeypatch.setitem(presets.CONBA_PRESETS, 'conba', presets.CONBA_PRESETS['conba'] | {'control': 'diag'})
    length = 1536
    devices = compiling.devices('h100', devices_per_host=4)
    module = layer_gradient('conba', shards, 4, length, 256, data=data, devices=devices)
    kernels = [line for line in module.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    names = {name for line in kernels for name in re.findall(r'diagonal_gain_(\w+?)[/"]', line)}
    assert names == set(KERNELS)
    ours = ' '.join(line for line in kernels if 'diagonal_gain_' in line)
    tokens = {int(rows) * int(time) for rows, time in re.findall(r'f32\[(\d+),(\d+),16,32\]', ours) if int(time) > 100}
    assert tokens == {4 * length // 4}
    found = collectives(module)
    assert found['all-gather'] == found['reduce-scatter'] == (0, 0)


def main(width: int) -> None:
    import jax
    import jax.numpy as jnp

    shape = jax.ShapeDtypeStruct
    batch, length, heads = 2, 4096, 128 // width  # so few that time is cut

    def gradient(e, alpha, log_decay, reset, initial):
        def loss(*args):
            return jnp.sum(diagonal_mosaic_gpu.diagonal(*args, reset, initial)[0])

        return jax.grad(loss, (0, 1, 2))(e, alpha, log_decay)

    e, step = shape((batch, length, heads, width), jnp.float32), shape((batch, length, heads), jnp.float32)
    initial = shape((batch, heads, width), jnp.float32)
    compiling.compile_for(
        compiling.devices('h100')[0], gradient, e, step, step, shape((batch, length), jnp.bool_), initial
    )


if __name__ == '__main__':
    main(int(sys.argv[1]))
