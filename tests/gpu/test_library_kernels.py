"""Attention and grouped products as compiled for H100s that are not there: by tokamax's kernels, and portable.

Nothing runs. What needs tokamax is left out where it is not installed: the extra `plan` is without it, since its own
requirements are many.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.attention import attention
from mixcon_jax import config as configs
from mixcon_jax.parallel import kernels
from mixcon_jax.parallel.layout import batch_sharding
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.planning import compiling
from mixcon_jax.planning.collectives import collectives
from mixcon_jax.planning.hlo import kernels as launches
from mixcon_jax.planning.hlo import largest, loops

# A program for a device that is not there cannot be read back from the cache, and is compiled.
pytestmark = pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 4, 2048, 8, 2, 64


@pytest.fixture(scope='module')
def library():
    return pytest.importorskip('tokamax', reason='tokamax, of the extra "gpu", is not installed')


def shape(*sizes, dtype=jnp.bfloat16, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def gradients(function):
    """A function's result and its gradients, from the cotangent, the arrays that have gradients, and others."""

    def run(cotangent, arrays, *others):
        result, pull = jax.vjp(lambda *arrays: function(*arrays, *others), *arrays)
        return result, pull(cotangent)

    return run


def launched(text: str) -> int:
    return text.count('custom_call_target="mosaic_gpu')


def attended(packed: bool, length: int = LENGTH, **options):
    def run(q, k, v, segment_ids):
        return attention(q, k, v, segment_ids=segment_ids if packed else None, **options)

    q, k = shape(BATCH, length, HEADS, WIDTH), shape(BATCH, length, KV_HEADS, WIDTH)
    return gradients(run), (q, (q, k, k), shape(BATCH, length, dtype=jnp.int32))


@pytest.mark.parametrize('packed', [True, False])
def test_the_portable_loops_are_of_known_length(packed):
    """Of an unknown one, the host asks the device before every turn."""
    function, arguments = attended(packed, 4096, implementation='blockwise')
    text = compiling.compile_for(compiling.devices('h100')[0], function, *arguments).as_text()
    assert [loop.rounds for loop in loops(text)] == [10, 10] and ' conditional(' not in text


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('length', [LENGTH, 1000])
def test_attention_has_three_kernels_and_nothing_quadratic(library, packed, length):
    """Keys are not repeated for the query heads that share them, either."""
    function, arguments = attended(packed, length, implementation='tokamax')
    text = compiling.compile_for(compiling.devices('h100')[0], function, *arguments).as_text()
    assert launched(text) == 3 and ' while(' not in text
    assert largest(text) == BATCH * -(-length // 128) * 128 * HEADS * WIDTH
    assert f'{length},{length}]' not in text


@pytest.mark.parametrize('batch', [1, 8])
def test_decoding_reads_the_cache_once(batch):
    """One query to a long cache: its bytes, once, and the scores'."""
    keys, heads, kv_heads, width = 32768, 32, 8, 128

    def run(q, k_cache, v_cache, length):
        k, v = (cache.reshape(batch, keys, kv_heads, width) for cache in (k_cache, v_cache))
        return attention(q, k, v, q_offset=length)

    cache = shape(batch, keys, kv_heads * width)
    arguments = shape(batch, 1, heads, width), cache, cache, shape(dtype=jnp.int32)
    text = compiling.compile_for(compiling.devices('h100')[0], run, *arguments).as_text()
    moved = sum(kernel.total for kernel in launches(text)) / (2 * 2 * cache.size)
    print(f'{moved:.3f} of the cache')
    assert 1 < moved <= 1.3 and not loops(text)


@pytest.fixture
def on_mesh():
    """Absent H100s: two for the rows, two for the heads."""
    options = configs.default().mesh
    options.update({'data': 2, 'tensor': 2})
    return make_mesh(options, compiling.devices('h100', devices_per_host=4))


def compiled(mesh, function, *arguments) -> str:
    def inside(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    with jax.default_device(mesh.devices.flat[0]):
        return jax.jit(inside).trace(*arguments).lower(lowering_platforms=('cuda',)).compile().as_text()


def test_on_a_mesh_attention_says_nothing(library, on_mesh):
    """Each device computes its own rows and heads, of which its kernels take no more."""
    rows = NamedSharding(on_mesh, PartitionSpec(('data', 'fsdp'), None, 'tensor'))
    q, k = (shape(BATCH, LENGTH, count, WIDTH, sharding=rows) for count in (HEADS, KV_HEADS))
    ids = shape(BATCH, LENGTH, dtype=jnp.int32, sharding=NamedSharding(on_mesh, PartitionSpec(('data', 'fsdp'))))
    run = lambda q, k, v, segment_ids: kernels.attention(q, k, v, segment_ids=segment_ids, implementation='tokamax')
    text = compiled(on_mesh, gradients(run), q, (q, k, k), ids)
    assert launched(text) == 3 and largest(text) == BATCH * LENGTH * HEADS * WIDTH // 4
    assert all(found == (0, 0) for found in collectives(text).values())


def test_a_step_in_bfloat16_has_both(library):
    """Where the library's kernels are trusted, as here, or verified, nobody need name them."""
    from mixcon_jax.step import BATCH, make_steps

    config = configs.default()
    config.model.update(dim=256, vocab_size=128, pattern=('attention+moe',), dtype='bfloat16')
    config.model.attention.update(num_heads=4, num_kv_heads=2)
    config.model.moe.update(hidden_dim=192, implementation='grouped')
    config.data.seq_len, config.train.batch_size = 256, 8
    config = configs.validate(config)
    device = compiling.devices('h100')[0]
    mesh = make_mesh(config.mesh, [device])
    steps = make_steps(config, mesh)
    batch = {key: shape(8, 256, dtype=kind, sharding=batch_sharding(mesh)) for key, kind in BATCH.items()}
    with jax.default_device(device):
        lowered = steps.train_step.trace(steps.abstract_state, batch).lower(lowering_platforms=('cuda',))
        text = lowered.compile().as_text()
    assert launched(text) == 3 + 2 * 3  # of attention, and of the experts' two products: gate and up are one
    assert 'grouped_product' in text
