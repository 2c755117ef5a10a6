"""SSD's kernels as compiled for an H100 that is not there: registers, shared memory, tensor cores, no atomics, bytes.

Nothing runs. A process of its own compiles (`python -m tests.gpu.test_ssd KEYS WIDTH`), as LLVM may abort it.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections import Counter

import pytest

from tests.gpu import sass

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATCH, LENGTH, VALUES = 16, 2048, 1536
KIB, GIB = 2**10, 2**30

# Registers and KiB of shared memory; a block of `gradients` shares its registers out anew after the launch.
AT_LAUNCH = 65536 // (3 * 128) // 8 * 8
CEILINGS = {
    ('forward', 64): (200, 67), ('turned', 64): (96, 50), ('gradients', 64): (AT_LAUNCH, 109),
    ('forward', 128): (255, 107), ('turned', 128): (144, 74), ('gradients', 128): (AT_LAUNCH, 173),
}  # fmt: skip
TWO_A_CORE = 113  # KiB, that a block of `chain` may have for two of them to share a multiprocessor
SMALL, NAMES = 'HGMMA.64x64x16.F32.BF16', ('forward', 'turned', 'gradients')
FORMS = ((128, 64), (64, 64), (64, 128))  # keys, values

pytestmark = pytest.mark.slow  # of kernels compiled for an absent GPU, make test has those that run most


@pytest.fixture(scope='module', params=FORMS, ids=str)
def compiled(request, tmp_path_factory):
    """Keys of a head, the folder of what the compiler dumped, and what the program moves."""
    folder = tmp_path_factory.mktemp('dumps')
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'MOSAIC_GPU_DUMP_TO': str(folder)}
    environment |= {f'MOSAIC_GPU_DUMP_{kind}': '1' for kind in ('PTXAS', 'SASS_CTRL', 'RESOURCES')}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)  # a program from the cache dumps nothing
    command = [sys.executable, '-m', 'tests.gpu.test_ssd', *map(str, request.param)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param[0], folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', NAMES)
def test_kernel_keeps_below_its_ceilings(compiled, name):
    keys, folder, _ = compiled
    kernel = sass.read(folder, f'ssd_{name}')
    registers, shared = CEILINGS[name, keys]
    print(f'{name} {keys}: {kernel.registers} registers, {kernel.shared_bytes / KIB:.0f} KiB shared')
    assert kernel.registers <= registers and kernel.spilled_bytes == 0
    assert kernel.shared_bytes <= shared * KIB
    assert kernel.shared_bytes <= TWO_A_CORE * KIB or name == 'gradients'
    assert not any(opcode.startswith(('LDL', 'STL', 'ATOM', 'RED.')) for opcode in kernel.opcodes)


@pytest.mark.parametrize('name', NAMES)
def test_products_are_of_the_tensor_cores_and_wait_for_one_another_nowhere(compiled, name):
    """16 terms of a sum an instruction; scores and what the state gives are sums over the keys."""
    keys, folder, _ = compiled
    kernel = sass.read(folder, f'ssd_{name}')
    products = {opcode: n for opcode, n in kernel.opcodes.items() if 'GMMA' in opcode}
    expected = Counter()
    if name == 'forward':
        expected[SMALL] += 2 * keys // 16 + 64 // 16  # scores, the state read, the chunk's own
    if name == 'gradients':  # both sides: scores, the state read; pairs; one of them dx
        expected[SMALL] += 2 * (2 * keys // 16 + 64 // 16) + 64 // 16
    sums = 64 // 16 * (4 if name == 'gradients' else 1)  # dC and dB of tokens and state; or the state
    expected[f'HGMMA.64x{keys}x16.F32.BF16'] += sums
    assert products == expected
    (report,) = folder.glob(f'ssd_{name}_*.ptxas')
    assert 'serialized' not in report.read_text()


def test_it_moves_a_ninth_of_what_chunks_of_xla_do(compiled):
    """Which move 14.3 GiB in 214 launches, of 128 keys (kernels_pallas/ssd/README.md)."""
    keys, _, moved = compiled
    print(
        f'{keys} keys: {moved["launches"]} launches, {moved["bytes"] / GIB:.2f} GiB, {moved["mosaic"]} kernels of ours'
    )
    assert moved['mosaic'] == 3 and moved['launches'] <= 18
    assert moved['bytes'] <= (1.55 if keys == 128 else 1.15) * GIB


def main(keys: int, width: int) -> None:
    import jax
    import jax.numpy as jnp

    from kernels_pallas.ssd import ssd
    from mixcon_jax.planning import hlo
    from mixcon_jax.planning.compiling import compile_for, devices

    heads = VALUES // width
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((BATCH, *sizes), dtype)
    x, key, by_head = shape(LENGTH, heads, width), shape(LENGTH, 1, keys), shape(LENGTH, heads, dtype=jnp.float32)

    def run(dy, reset, x, log_decay, B, C, step):
        call = lambda *arrays: ssd(*arrays[:4], step=arrays[4], reset=reset, implementation='mosaic_gpu')[0]
        y, pull = jax.vjp(call, x, log_decay, B, C, step)
        return y, pull(dy)

    compiled = compile_for(
        devices('h100')[0], run, x, shape(LENGTH, dtype=bool), x, by_head, key, key, by_head
    )  # fmt: skip
    text = compiled.as_text()
    kernels = hlo.kernels(text)
    found = {'bytes': sum(k.total for k in kernels), 'launches': sum(k.count for k in kernels)}
    print(json.dumps(found | {'mosaic': text.count('custom_call_target="mosaic_gpu')}))


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
