"""Layers on a sequence that several devices share give what one device gives, outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax import config as configs
from mixcon_jax import sharding
from mixcon_jax.models import presets
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters
from mixcon_jax.models.mixers.conba import Conba
from tests.models.cases import DIM, layer, model_config, packed_context

T = 32
PRESETS = ('mamba', *presets.CONBA_PRESETS)
OTHERS = ('conba_diag', 'conba_companion', 'conba_noise', 'attention_rope', 'moe_grouped')
NOISE = {
    'conba.process_noise': 0.1, 'conba.observation_noise': 0.1, 'conba.control': 'none', 'conba.delay': 'none'
}  # fmt: skip
# Two rows: documents that start on the borders of 2, 4 and 8 shards, and off them, with padding after the last.
DOCUMENTS = ([8, 8, 4, 12], [3, 1, 15, 9])


def context():
    rows = [packed_context(lengths, T) for lengths in DOCUMENTS]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    return Context(joined.segment_ids, joined.positions, rng=jax.random.key(3), train=True)


def mesh(shards):
    config = configs.default().mesh
    config.context = shards
    return sharding.make_mesh(config, jax.devices()[:shards])


def gradient(name, shards):
    """``(variables, x, context) -> (loss, outputs), gradients`` on ``shards`` devices, jitted."""
    module = layer(name) if name != 'conba_noise' else Conba(model_config(NOISE), Parameters(jax.random.key(0)), 4)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    on = mesh(shards)

    def run(params, x, context):
        with jax.sharding.use_abstract_mesh(on.abstract_mesh):
            y, _, aux = nnx.merge(graphdef, params, rest)(x, context, None)
        y = jnp.where(context.mask[..., None], y, 0)
        losses = sum(jax.tree.leaves(aux.get('losses', {})), 0.0)
        return jnp.vdot(y, jax.random.normal(jax.random.key(1), y.shape)) + losses, (y, aux)

    graded = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    split = NamedSharding(on, PartitionSpec(None, 'context'))
    everywhere = NamedSharding(on, PartitionSpec())
    return jax.jit(graded, in_shardings=(everywhere, split, everywhere)), params


@functools.cache
def found(name, shards):
    run, params = gradient(name, shards)
    x = jax.random.normal(jax.random.key(2), (len(DOCUMENTS), T, DIM))
    return jax.device_get(run(params, x, context()))


CASES = [(name, shards) for name in PRESETS for shards in (2, 4, 8)] + [(name, 4) for name in OTHERS]


@pytest.mark.parametrize('name, shards', CASES)
def test_shards_equal_one_device(name, shards):
    """Outputs, statistics and losses, and the gradients of inputs and parameters."""
    pairs = zip(jax.tree.leaves_with_path(found(name, shards)), jax.tree.leaves(found(name, 1)), strict=True)
    for (path, got), want in pairs:
        error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
        assert error < 1e-5, f'{jax.tree_util.keystr(path)} differs by {error:.1e} of its largest value'
