"""The grouped product as compiled for an H100 that is not there: registers, shared memory, tensor cores, no atomics.

Nothing runs. A process of its own compiles what is dumped (`python -m tests.gpu.test_grouped_matmul`), as LLVM may
abort it.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.grouped_matmul import grouped_matmul
from mixcon_jax import config as configs
from mixcon_jax.parallel import split
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.planning import compiling
from mixcon_jax.planning.collectives import collectives
from mixcon_jax.planning.hlo import largest
from tests.gpu import sass

# A program for a device that is not there cannot be read back from the cache, and is compiled.
pytestmark = pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS, GROUPS, WIDTH, COLUMNS = 65536, 8, 768, 832
AT_LAUNCH = 65536 // (3 * 128) // 8 * 8  # registers a thread, of three warpgroups; from there they are shared out anew
SHARED = {'product': 193, 'turned': 193, 'matrices': 161}  # KiB, of 227


def shape(*sizes, dtype=jnp.bfloat16, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def graded(dy, x, w, group_sizes):
    run = lambda x, w: grouped_matmul(x, w, group_sizes, implementation='mosaic_gpu')
    y, pull = jax.vjp(run, x, w)
    return y, pull(dy)


def compiled_text() -> str:
    arrays = shape(ROWS, COLUMNS), shape(ROWS, WIDTH), shape(GROUPS, WIDTH, COLUMNS), shape(GROUPS, dtype=jnp.int32)
    return compiling.compile_for(compiling.devices('h100')[0], graded, *arrays).as_text()


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
    """The folder of what the compiler dumped, and the program's text."""
    folder = tmp_path_factory.mktemp('dumps')
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'MOSAIC_GPU_DUMP_TO': str(folder)}
    environment |= {f'MOSAIC_GPU_DUMP_{kind}': '1' for kind in ('PTXAS', 'SASS_CTRL', 'RESOURCES')}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)  # a program from the cache dumps nothing
    command = [sys.executable, '-m', 'tests.gpu.test_grouped_matmul']
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


@pytest.mark.parametrize('name', SHARED)
def test_kernel_keeps_below_its_ceilings(compiled, name):
    kernel = sass.read(compiled[0], f'grouped_{name}')
    print(f'{name}: {kernel.registers} registers, {kernel.shared_bytes / 1024:.0f} KiB shared')
    assert kernel.registers == AT_LAUNCH and kernel.spilled_bytes == 0
    assert kernel.shared_bytes <= SHARED[name] * 1024
    assert not any(opcode.startswith(('LDL', 'STL', 'ATOM', 'RED.')) for opcode in kernel.opcodes)


@pytest.mark.parametrize('name', SHARED)
def test_products_are_of_the_tensor_cores_and_not_one_by_one(compiled, name):
    """A turn of a warpgroup is 64 by 128 numbers, of 64 terms each, 16 an instruction."""
    kernel = sass.read(compiled[0], f'grouped_{name}')
    (loop,) = (loop for loop in kernel.loops if loop.inner and loop.count('HGMMA'))
    products = {opcode: n for opcode, n in loop.opcodes.items() if 'GMMA' in opcode}
    assert products == {'HGMMA.64x128x16.F32.BF16': 4}
    (report,) = compiled[0].glob(f'grouped_{name}_*.ptxas')
    assert 'serialized' not in report.read_text()


def test_there_are_three_kernels_no_dense_product_and_no_loop(compiled):
    """Nor is anything copied: what is held besides arguments and results is lists of tiles."""
    text = compiled[1]
    assert text.count('custom_call_target="mosaic_gpu') == 3
    assert not any(word in text for word in (' dot(', 'cublas', ' while(', ' conditional('))
    assert largest(text) == ROWS * COLUMNS
    wide = [line for line in text.splitlines() if f'bf16[{ROWS},' in line and ('fusion(' in line or ' copy' in line)]
    assert not wide, wide


@pytest.fixture
def on_mesh():
    """Absent H100s: two for the rows, two for the columns."""
    options = configs.default().mesh
    options.update({'data': 2, 'tensor': 2})
    return make_mesh(options, compiling.devices('h100', devices_per_host=4))


def test_on_a_mesh_it_takes_a_devices_own_rows(on_mesh):
    """Only the matrices' gradients are exchanged, summed over the rows."""
    groups, width, columns = 4, 128, 192

    def local(x, w):
        group_sizes = jnp.full(groups, x.shape[0] // groups, jnp.int32)
        return grouped_matmul(x, w, group_sizes, implementation='mosaic_gpu')

    def run(dy, x, w):
        dims = {'x': 'b d', 'w': 'e d f'}
        with jax.sharding.use_abstract_mesh(on_mesh.abstract_mesh):
            y, pull = jax.vjp(lambda x, w: split.by_parts(local, {'x': x, 'w': w}, dims, 'b f', {'b': 'batch'}), x, w)
            return y, pull(dy)

    rows, whole = (NamedSharding(on_mesh, PartitionSpec(*axes)) for axes in ((('data', 'fsdp'),), ()))
    x, dy = (shape(2048, count, sharding=rows) for count in (width, columns))
    with jax.default_device(on_mesh.devices.flat[0]):
        traced = jax.jit(run).trace(dy, x, shape(groups, width, columns, sharding=whole))
        text = traced.lower(lowering_platforms=('cuda',)).compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3
    found = collectives(text)
    assert found['all-gather'] == (0, 0) and found['all-reduce'][0] > 0
    assert largest(text) <= 2048 // 2 * columns


if __name__ == '__main__':
    print(compiled_text())
