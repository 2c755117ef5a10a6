"""Attention's gradient as compiled for an H100 that is not there: registers, no spills, shared memory, no atomics, and
what a turn of its loops takes.

Nothing runs. A process of its own compiles (`python -m tests.gpu.test_attention_gradient WIDTH PACKED`), as LLVM
may abort it.
"""

import os
import pathlib
import subprocess
import sys
from collections import Counter

import pytest

from tests.gpu import sass

TILE = 64
ROOT = pathlib.Path(__file__).resolve().parents[2]
DUMPS = ('PTXAS', 'SASS_CTRL', 'RESOURCES')
AT_LAUNCH = 65536 // (3 * 128) // 8 * 8  # registers a thread, of three warpgroups; from there they are shared out anew

# KiB of shared memory; instructions of a turn
CEILINGS = {('dq', 64): (81, 430), ('dkv', 64): (83, 475), ('dq', 128): (161, 490), ('dkv', 128): (163, 505)}
PRODUCTS = {'dq': 3, 'dkv': 4}  # of a tile
FORMS = ((128, True), (64, True), (128, False))  # width, packed; 128 takes the most registers and shared memory

pytestmark = pytest.mark.slow  # of kernels compiled for an absent GPU, make test has those that run most


@pytest.fixture(scope='module', params=FORMS, ids=str)
def compiled(request, tmp_path_factory):
    width, packed = request.param
    folder = tmp_path_factory.mktemp('dumps')
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'MOSAIC_GPU_DUMP_TO': str(folder)}
    environment |= {f'MOSAIC_GPU_DUMP_{kind}': '1' for kind in DUMPS}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)  # a program from the cache dumps nothing
    command = [sys.executable, '-m', 'tests.gpu.test_attention_gradient', str(width), str(int(packed))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return width, folder


@pytest.mark.parametrize('name', PRODUCTS)
def test_kernel_keeps_below_its_ceilings(compiled, name):
    width, folder = compiled
    kernel = sass.read(folder, f'attention_{name}')
    shared, _ = CEILINGS[name, width]
    print(
        f'{name} {width}: {kernel.registers} registers, {kernel.spilled_bytes} bytes spilled,'
        f' {kernel.shared_bytes / 1024:.0f} KiB shared'
    )
    assert kernel.registers == AT_LAUNCH
    assert kernel.spilled_bytes == 0
    assert kernel.shared_bytes <= shared * 1024


@pytest.mark.parametrize('name', PRODUCTS)
def test_products_are_of_the_tensor_cores_and_sums_have_one_owner(compiled, name):
    width, folder = compiled
    kernel = sass.read(folder, f'attention_{name}')
    assert not any(opcode.startswith(('ATOM', 'RED.')) for opcode in kernel.opcodes)
    products = {opcode: n for opcode, n in kernel.opcodes.items() if 'GMMA' in opcode}
    # 16 terms of a sum an instruction: S and dP over the width, what is summed up over the tile's 64.
    assert sum(products.values()) == 2 * width // 16 + (PRODUCTS[name] - 2) * 64 // 16
    (report,) = folder.glob(f'attention_{name}_*.ptxas')
    assert 'serialized' not in report.read_text()


@pytest.mark.parametrize('name', PRODUCTS)
def test_a_turn_is_products_and_little_else(compiled, name):
    """Large products that wait for one another nowhere, nothing in local memory, no sum that moves."""
    width, folder = compiled
    kernel = sass.read(folder, f'attention_{name}')
    (turn,) = (loop for loop in kernel.loops if loop.inner and loop.count('HGMMA'))
    expected = Counter({'HGMMA.64x64x16.F32.BF16': 2 * width // 16})
    expected[f'HGMMA.64x{width}x16.F32.BF16'] += (PRODUCTS[name] - 2) * TILE // 16
    assert {opcode: n for opcode, n in turn.opcodes.items() if 'GMMA' in opcode} == expected
    assert turn.count('LDL', 'STL', 'LD.', 'ST.') == 0
    assert turn.count('WARPGROUP.DEPBAR') == 3  # scores, dP, and the end of the turn
    assert turn.count('MUFU') == TILE * TILE // 128
    # 32 are the zeros that dP begins with; a sum that moves takes as many more.
    assert turn.count('MOV', 'IMAD.MOV') <= 32 + 20
    print(f'{name} {width}: {turn.count()} instructions a turn')
    assert turn.count() <= CEILINGS[name, width][1]


def main(width: int, packed: bool) -> None:
    import jax
    import jax.numpy as jnp

    from kernels_pallas.attention import mosaic_gpu
    from mixcon_jax.planning.compiling import compile_for, devices

    batch, length, heads, kv_heads = 2, 4096, 8, 2
    queries, keys = (jax.ShapeDtypeStruct((batch, length, n, width), jnp.bfloat16) for n in (heads, kv_heads))
    logsumexp = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    start = jax.ShapeDtypeStruct((batch, length), jnp.int32) if packed else None

    def run(*arrays):
        return mosaic_gpu.backward(*arrays, width**-0.5)

    compile_for(devices('h100')[0], run, queries, keys, keys, queries, queries, logsumexp, start)


if __name__ == '__main__':
    main(int(sys.argv[1]), sys.argv[2] == '1')
