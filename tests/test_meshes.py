"""A step of a MixCon of every layer type on meshes of eight devices gives one device's loss and gradients."""

import functools
import re
import zlib

import jax
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax import step
from mixcon_jax.trees import map_named, named_leaves
from tests.training import mesh_of, random_batch, step_config

LENGTH, VOCAB = 16, 64
OPTIONS = {
    'model__pattern': ('conba+moe', 'mamba+mlp', 'attention|moe'),
    'model__num_blocks': 1,
    'model__vocab_size': VOCAB,
    'model__attention__num_heads': 4,
    'model__attention__num_kv_heads': 4,
    'model__conba__head_dim': 8,
    'model__conba__gain_chunk': 4,
    'model__ssm__d_state': 4,
    'model__ssm__chunk': 2,
    'model__mamba2__head_dim': 8,
    'model__mamba2__d_state': 4,
    'model__moe__num_experts': 8,
    'model__moe__implementation': 'grouped',
    'model__moe__group_block': 4,
    'model__moe__router_z_coef': 0.01,
    'data__seq_len': LENGTH,
    'train__z_loss_coef': 0.001,
    'optim__clip_norm': 0.0,
}
# No more of them in a row: rounding grows with each, and beyond these even a batch apart by rows is not within 2e-5.
RWKV = {
    'model__pattern': ('rwkv4+rwkv_channel_mix', 'rwkv6+mlp', 'rwkv7'),
    'model__norm': 'layer',
    'model__embedding_norm': True,
}
MATRICES = {'model__pattern': ('mamba2+mlp', 'large_kernel', 'retnet'), 'model__mamba2__groups': 2}
PANGU = {'model__pattern': ('mamba2+series_mlp', 'attention'), 'model__shortcut__reduction': 4}
INNER = {
    'model__pattern': ('moe_mamba|moe', 'mamba+moe'),
    'model__moe_mamba__projections': ('conv', 'gate', 'output'),
    'model__moe_mamba__hidden_dim': 24,
    'model__moe__expert': 'relu',
    'model__moe__top_k': 1,
    'model__moe__expert_capacity': 1.25,
}
CONVOLUTIONS = {
    'model__pattern': ('hyena+mlp', 'hyena_modal'),
    'model__hyena__max_len': LENGTH,
    'model__hyena__filter_width': 8,
    'model__hyena__features': 5,
}
SORTED = {'model__pattern': ('attention+mlp',), 'model__embedding_gradient': 'sorted'}
SIXTEEN = {'model__moe__num_experts': 16}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MESHES = [
    slow({'data': 8}, {}),
    slow({'fsdp': 8}, {}),
    slow({'fsdp': 2, 'tensor': 4}, {}),
    slow({'fsdp': 2, 'expert': 4}, {}),
    slow({'context': 4, 'fsdp': 2}, {}),
    slow({'data': 2, 'expert': 2, 'tensor': 2}, {}),
    (
        {'data': 2, 'expert': 2, 'tensor': 2},
        {'model__pattern': ('conba+moe', 'attention|moe')},
    ),  # a scan is Conba's, too
    slow({'context': 2, 'expert': 2, 'tensor': 2}, {}),
    slow({'expert': 8}, {}),
    slow({'expert': 8}, SIXTEEN),
    slow({'fsdp': 2, 'context': 2, 'tensor': 2}, MATRICES),
    slow({'fsdp': 2, 'context': 2, 'tensor': 2}, PANGU),
    slow({'fsdp': 2, 'context': 2, 'tensor': 2}, RWKV),
    slow({'fsdp': 2, 'context': 2, 'tensor': 2}, {'model__pattern': ('gla+mlp',)}),
    slow({'fsdp': 2, 'context': 2, 'tensor': 2}, SORTED),
    slow({'data': 2, 'fsdp': 4}, SORTED),
    slow({'expert': 4, 'tensor': 2}, INNER),
    slow({'fsdp': 2, 'context': 2, 'expert': 2}, INNER),
    slow({'fsdp': 2, 'context': 2, 'tensor': 2}, CONVOLUTIONS),
]


def validated(devices, mesh, options):
    axes = {f'mesh__{axis}': size for axis, size in mesh.items()}
    return configs.validate(step_config(**OPTIONS | options | {'mesh__data': 1} | axes), devices)


def moved(name, x):
    """A parameter away from its initial value, where some mechanisms are switched off and have no gradient."""
    return np.asarray(x) + 0.1 * np.random.default_rng(zlib.crc32(name.encode())).normal(size=x.shape)


def one_step(devices, mesh, options, batch=None):
    """Metrics and gradients of the first step: Adam's first moment is a tenth of them."""
    config = validated(devices, mesh, options)
    steps = step.make_steps(config, mesh_of(config, devices))
    batch = steps.put(batch or random_batch(1, 8, LENGTH, VOCAB))
    state = steps.init_state()
    state, metrics = steps.train_step(step.load_params_into(state, map_named(moved, state.params)), batch)
    moment = next(part.mu for part in state.opt_state if hasattr(part, 'mu'))
    return jax.device_get((metrics, jax.tree.map(lambda m: m / 0.1, moment)))


def assert_same(got, want, tolerance=2e-5):
    """Of metrics and gradients: relative to each value, and to the largest of its array."""
    got, want = named_leaves(got), named_leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        largest = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], rtol=tolerance, atol=tolerance * largest, err_msg=name)


@functools.cache
def wanted(**options):
    return one_step(1, {}, options)


@pytest.mark.parametrize('mesh, options', MESHES, ids=lambda case: 'x'.join(f'{k}{v}' for k, v in case.items()) or '-')
def test_a_step_on_a_mesh_is_that_of_one_device(mesh, options):
    want = named_leaves(wanted(**options))
    assert_same(one_step(8, mesh, options), wanted(**options))
    idle = {name for name in want if not np.any(want[name])}
    assert not [name for name in idle if name.startswith('1/')], 'a gradient of zero compares nothing'


@pytest.mark.slow  # of compiled text; the values are compared above
def test_neither_logits_nor_features_are_gathered_over_tensor():
    """In the compiled step: no array holds all logits of a token, and gathers are of parameters alone."""
    length, dim, vocab = 32, 48, 1000
    options = {
        'model__pattern': ('mamba+mlp', 'attention+moe'), 'model__vocab_size': vocab, 'model__dim': dim,
        'data__seq_len': length, 'train__loss_chunk': 64,
    }  # fmt: skip
    config = validated(4, {'fsdp': 2, 'tensor': 2}, options)
    steps = step.make_steps(config, mesh_of(config, 4))
    batch = steps.put(random_batch(1, 8, length, vocab))
    program = steps.train_step.lower(steps.abstract_state, batch).compile().as_text()
    shapes = lambda text: [tuple(map(int, found.split(','))) for found in re.findall(r'f32\[([0-9,]+)\]', text)]
    assert not [shape for shape in shapes(program) if vocab in shape]
    gathers = [line for line in program.splitlines() if re.search(r' all-gather(-start)?\(', line)]
    assert gathers and not [shape for line in gathers for shape in shapes(line) if length in shape]
