"""The gain's and the convolution's kernels as compiled for an H100 that is not there: registers, spills, instructions.

Nothing runs. A process of its own compiles (`python -m tests.gpu.test_gain_and_conv`), as LLVM may abort it.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.gpu import sass

ROOT = pathlib.Path(__file__).resolve().parents[2]
DUMPS = ('PTXAS', 'SASS_CTRL', 'RESOURCES')

# registers, KiB of shared memory, instructions and shuffles of a token's step (the convolution's: of four tokens)
CEILINGS = {
    'adaptive_gain_forward': (88, 40, 150, 8),
    'adaptive_gain_backward': (104, 40, 285, 41),
    'adaptive_gain_replay': (88, 44, 175, 8),
    'causal_conv1d_backward': (112, 68, 420, 0),
}


BARRIERS = {  # in the loop over tiles; the convolution's stores its results itself
    'adaptive_gain_forward': 3,
    'adaptive_gain_backward': 4,
    'adaptive_gain_replay': 3,
    'causal_conv1d_backward': 1,
}


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dumps')
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'MOSAIC_GPU_DUMP_TO': str(folder)}
    environment |= {f'MOSAIC_GPU_DUMP_{kind}': '1' for kind in DUMPS}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)  # a program from the cache dumps nothing
    command = [sys.executable, '-m', 'tests.gpu.test_gain_and_conv']
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: sass.read(folder, name) for name in CEILINGS}


@pytest.mark.parametrize('name', CEILINGS)
def test_kernel_spills_nothing_and_keeps_below_its_ceilings(kernels, name):
    kernel = kernels[name]
    (step,) = kernel.inner
    registers, shared, instructions, shuffles = CEILINGS[name]
    counts = f'{step.count()} instructions, {step.count("SHFL")} shuffles'
    print(f'{name}: {kernel.registers} registers, {kernel.shared_bytes / 1024:.0f} KiB shared, {counts}')
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= registers
    assert kernel.shared_bytes <= shared * 1024
    assert step.count() <= instructions
    assert step.count('SHFL') <= shuffles


@pytest.mark.parametrize('name', CEILINGS)
def test_no_atomics_and_no_barrier_in_the_step(kernels, name):
    """What the interpreter, for which a warpgroup is one thread, cannot see."""
    kernel = kernels[name]
    (step,) = kernel.inner
    assert not any(opcode.startswith(('ATOM', 'RED.')) for opcode in kernel.opcodes)
    assert step.count('BAR') == step.count('FENCE') == 0
    # Around the steps: a tile may be overwritten only behind a barrier, and is sent only behind another.
    tile = max(kernel.loops, key=lambda loop: loop.count())
    assert tile.count('BAR') == BARRIERS[name]  # one less is a race


def main() -> None:
    import jax
    import jax.numpy as jnp

    from kernels_pallas.adaptive_gain import matrix_gain
    from kernels_pallas.causal_conv1d import causal_conv1d
    from mixcon_jax.planning.compiling import compile_for, devices

    shape = jax.ShapeDtypeStruct
    batch, length, heads, width = 8, 4096, 256, 32

    def gain(e, alpha, log_decay, reset):
        return jax.grad(lambda *args: jnp.sum(matrix_gain(*args, reset=reset)[0]), (0, 1, 2))(e, alpha, log_decay)

    def conv(x, weight, bias, positions):
        loss = lambda *args: jnp.sum(causal_conv1d(*args, positions=positions, activation='silu')[0])
        return jax.grad(loss, (0, 1, 2))(x, weight, bias)

    e, step = shape((batch, length, heads, width), jnp.float32), shape((batch, length, heads), jnp.float32)
    x, tokens = shape((batch, length, heads * width), jnp.bfloat16), (batch, length)
    device = devices('h100')[0]
    compile_for(device, gain, e, step, step, shape(tokens, jnp.bool_))
    channels = heads * width
    weight, bias = shape((4, channels), jnp.float32), shape((channels,), jnp.float32)
    compile_for(device, conv, x, weight, bias, shape(tokens, jnp.int32))


if __name__ == '__main__':
    main()
