"""What the devices of a mesh send one another in a whole train step, compiled for absent H100s."""

import functools
import math
import re

import jax
import pytest

from mixcon_jax import config as configs
from mixcon_jax.models import accounting
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.planner import programs
from mixcon_jax.planning import compiling, hlo
from mixcon_jax.planning.collectives import COLLECTIVES, payload
from mixcon_jax.step import make_steps

ROWS, LENGTH, DIM, MICROBATCHES, BLOCKS = 16, 272, 128, 2, 2
PATTERN = 'mamba+mlp', 'attention+mlp'
KV_HEADS, HEAD_DIM = 4, 24

pytestmark = pytest.mark.slow


def configuration(**options):
    config = configs.default()
    config.model.update(dim=DIM, dtype='bfloat16', num_blocks=BLOCKS, vocab_size=1000, unroll=1, pattern=PATTERN)
    config.model.mlp.hidden_dim = 256
    config.model.attention.update(num_heads=8, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    config.data.seq_len = LENGTH
    config.train.update(batch_size=ROWS, accum_steps=MICROBATCHES)
    for key, value in options.items():
        configs.put(config, key.replace('__', '.'), value)
    return configs.validate(config, 4)


@functools.cache
def exchanged(**options):
    """Every exchange of a step: its kind, the dimensions of what it gives, its bytes, how often."""
    config = configuration(**options)
    mesh = make_mesh(config.mesh, compiling.devices('h100', devices_per_host=4))
    with jax.default_device(mesh.devices.flat[0]):
        compiled = programs.train_step(config, make_steps(config, mesh)).compile()
    found = []
    for kernel in hlo.kernels(compiled.as_text()):
        kind = re.sub('-start$', '', kernel.kind)
        if kind in COLLECTIVES:
            shapes = [tuple(map(int, dims.split(','))) for dims in re.findall(r'\[([\d,]+)\]', str(kernel.shape))]
            found.append((kind, shapes, payload(kernel), kernel.count))
    assert found
    return found


def total(found, *kinds):
    return sum(size * count for kind, _, size, count in found if kind in kinds)


def test_fsdp_gathers_each_parameter_at_most_twice_and_sums_each_gradient_once():
    """For every microbatch; parameters and the gradients of matrices travel in bfloat16."""
    found = exchanged(mesh__fsdp=4)
    spread = sum(
        math.prod(shape)
        for _, shape, axes in accounting.parameters(configuration(mesh__fsdp=4).model)
        if 'embed' in axes
    )
    assert 1.5 * 2 * spread < total(found, 'all-gather') / MICROBATCHES <= 2 * 2 * spread
    # The embedding's gradient is summed in float32, and so are the small arrays'.
    assert 2 * spread <= total(found, 'reduce-scatter', 'all-reduce') / MICROBATCHES <= 4 * spread
    assert not total(found, 'all-to-all', 'collective-permute')


@pytest.mark.parametrize('mesh', [{'data': 4}, {'data': 2, 'fsdp': 2}], ids=str)
def test_gradients_are_summed_over_data_once_a_step(mesh):
    """In float32, each device its own part; without the option most of them are summed for every microbatch."""
    options = {f'mesh__{axis}': size for axis, size in mesh.items()}
    parameters = 4 * accounting.parameter_count(configuration(**options).model).total
    once = parameters / mesh.get('fsdp', 1)

    def sums(found, often):
        return sum(size for kind, _, size, count in found if kind == 'all-reduce' and (count > 1) == often)

    found = exchanged(train__sum_gradients='step', **options)
    assert once <= sums(found, often=False) < 1.06 * once  # some parameters are whole along fsdp
    per_microbatch = sums(exchanged(**options), often=True)
    if 'fsdp' in mesh:  # the embedding's gradient stays, which fsdp sums
        assert sums(found, often=True) < 0.7 * per_microbatch
    else:
        assert sums(found, often=True) == 0 and per_microbatch > 0.3 * parameters


def test_tensor_sums_features_twice_a_layer_and_pass():
    """Once after the mixer, once after the FFN; in the backward pass once before each. And embedding and loss once."""
    found = exchanged(mesh__tensor=4)
    rows = ROWS // MICROBATCHES
    features = rows * LENGTH * DIM * 2  # bytes in bfloat16
    sums = sum(count for kind, _, size, count in found if kind == 'all-reduce' and size == features)
    assert sums == MICROBATCHES * (BLOCKS * len(PATTERN) * 2 * 2 + 2)
    # Beside them: Mamba's dt, B and C, which are of all channels, and the loss's own: three numbers a token and device.
    assert total(found, 'all-gather') == MICROBATCHES * rows * LENGTH * 3 * 4 * 4
    assert total(found, 'reduce-scatter', 'all-to-all') == 0
    assert total(found, 'all-reduce') < 1.6 * sums * features


@pytest.mark.parametrize('packing', [True, False])
@pytest.mark.parametrize('mesh', [{'fsdp': 4}, {'tensor': 4}, {'context': 4}, {'context': 2, 'tensor': 2}], ids=str)
def test_attention_gathers_keys_and_values_alone(mesh, packing):
    """And those only where the sequence is shared out, a device's own heads of them."""
    options = {f'mesh__{axis}': size for axis, size in mesh.items()}
    found = exchanged(data__packing=packing, model__pattern=('attention+mlp',), **options)
    rows, heads = ROWS // MICROBATCHES, KV_HEADS // mesh.get('tensor', 1)
    gathered = {shape for kind, shapes, _, _ in found if kind == 'all-gather' for shape in shapes if LENGTH in shape}
    of_tokens = {(rows, LENGTH)}  # documents and positions, a number a token
    assert not total(found, 'all-to-all', 'collective-permute')
    assert gathered - of_tokens == ({(rows, LENGTH, heads, HEAD_DIM)} if 'context' in mesh else set())
