"""The selective scan under `jax.shard_map` over batch and channels: the same results, and only sums are exchanged."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas.selective_scan import selective_scan
from mixcon_jax.planning import compiling
from mixcon_jax.planning.hlo import ARRAY, parse

# A program for a device that is not there cannot be read back from the cache, and is compiled.
pytestmark = pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')

BATCH, LENGTH, CHANNELS, STATES = 4, 96, 512, 16
TOKENS, PER_CHANNEL, PER_ROW = (
    PartitionSpec(*axes) for axes in (('batch', None, 'channels'), ('channels',), ('batch',))
)
SPECS = (
    dict.fromkeys(('u', 'dt', 'z'), TOKENS)
    | dict.fromkeys(('A', 'D', 'dt_bias'), PER_CHANNEL)
    | dict.fromkeys(('B', 'C', 'reset'), PER_ROW)
    | {'initial_state': PartitionSpec('batch', 'channels')}
)
WIDTHS = {'u': 'btd', 'dt': 'btd', 'z': 'btd', 'A': 'dn', 'D': 'd', 'dt_bias': 'd', 'B': 'btn', 'C': 'btn'}
WIDTHS |= {'reset': 'bt', 'initial_state': 'bdn'}
SIZES = {'b': BATCH, 't': LENGTH, 'd': CHANNELS, 'n': STATES}
SHAPES = {name: tuple(SIZES[axis] for axis in axes) for name, axes in WIDTHS.items()}


COMMUNICATION = {'all-reduce', 'all-gather', 'all-to-all', 'ragged-all-to-all', 'reduce-scatter', 'collective-permute'}
COMMUNICATION |= {'collective-broadcast', 'send', 'recv'}


def mesh_of(devices) -> Mesh:
    return Mesh(np.array(devices[:4]).reshape(2, 2), ('batch', 'channels'), axis_types=(AxisType.Auto,) * 2)


def plain(implementation):
    return lambda args: selective_scan(**args, dt_softplus=True, implementation=implementation)


def sharded(implementation, mesh):
    outputs = (TOKENS, SPECS['initial_state'])
    # Kernels and loops do not follow what differs between devices, hence no check_vma.
    return jax.shard_map(plain(implementation), mesh=mesh, in_specs=(SPECS,), out_specs=outputs, check_vma=False)


def with_gradients(scan):
    """The scan's results, and the gradients of all its arguments."""

    def loss(args, reset):
        y, final_state = results = scan(args | {'reset': reset})
        return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(jnp.sin(final_state)), results

    return jax.value_and_grad(loss, has_aux=True)


def test_equals_the_unsharded_call():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    args = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}
    args |= {'A': -jnp.exp(args['A']), 'dt': args['dt'] - 2}
    reset = args.pop('reset') > 2
    scans = plain('chunked'), sharded('chunked', mesh_of(jax.devices()))
    here, there = (jax.jit(with_gradients(scan))(args, reset) for scan in scans)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5 * np.abs(x).max()), here, there)


@pytest.fixture
def absent():
    """A mesh of H100s that are not there, and the arguments' shapes on it."""
    mesh = mesh_of(compiling.devices('h100', devices_per_host=4))
    dtype = {'reset': jnp.bool_} | dict.fromkeys(('A', 'D', 'dt_bias', 'initial_state'), jnp.float32)
    return mesh, {
        name: jax.ShapeDtypeStruct(shape, dtype.get(name, jnp.bfloat16), sharding=NamedSharding(mesh, SPECS[name]))
        for name, shape in SHAPES.items()
    }


def compiled(function, mesh, *args, **options) -> str:
    with jax.default_device(mesh.devices.flat[0]):
        return jax.jit(function, **options).trace(*args).lower(lowering_platforms=('cuda',)).compile().as_text()


def exchanged(text: str) -> dict[tuple[str, str], int]:
    """Elements that a device puts in, by what is done and the mesh axes it is done along."""
    found: dict[tuple[str, str], int] = {}
    for body in parse(text)[0].values():
        for instruction in body.values():
            kind = instruction.opcode.removesuffix('-start')
            if kind in COMMUNICATION:
                axes = re.search(r'replica_groups=mesh\[[^\]]*\] \{([^}]*)\}', instruction.attributes)
                key = kind, axes[1] if axes else instruction.attributes
                size = sum(array_elements(body[operand].shape) for operand in instruction.operands)
                found[key] = found.get(key, 0) + size
    return found


def array_elements(shape: str) -> int:
    return sum(math.prod(map(int, filter(None, dims.split(',')))) for _, dims in ARRAY.findall(shape))


def test_forward_says_nothing(absent):
    mesh, args = absent
    text = compiled(sharded('mosaic_gpu', mesh), mesh, args)
    assert 'selective_scan_forward' in text
    assert f'[{BATCH // 2},{LENGTH},{CHANNELS // 2}]' in text  # a quarter
    assert f',{CHANNELS}]' not in text
    assert exchanged(text) == {}


def test_gradients_are_summed_where_their_arguments_are_shared(absent):
    """Of A, D and dt_bias over the rows, of B and C over the channels, and nothing else."""
    mesh, args = absent
    reset = args.pop('reset')
    shardings = {name: x.sharding for name, x in args.items()}
    gradients = lambda *args: with_gradients(sharded('mosaic_gpu', mesh))(*args)[1]
    text = compiled(gradients, mesh, args, reset, out_shardings=shardings)
    assert 'selective_scan_backward' in text
    assert exchanged(text) == {
        ('all-reduce', "'batch'"): CHANNELS // 2 * (STATES + 2),
        ('all-reduce', "'channels'"): 2 * (BATCH // 2) * LENGTH * STATES,
    }
