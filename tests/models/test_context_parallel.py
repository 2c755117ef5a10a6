"""Layers on a sequence that several devices share give what one device gives, outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax import config as configs
from mixcon_jax.models import presets
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters
from mixcon_jax.models.mixers.conba import Conba
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.planning.collectives import collectives, of_sequence
from tests.models.cases import DIM, layer, model_config, packed_context

T = 32
PRESETS = ('mamba', *presets.CONBA_PRESETS)
OTHERS = ('conba_diag', 'conba_companion', 'conba_noise', 'attention_rope', 'moe_grouped')
FAMILY = (
    'attention_window',
    'mamba2',
    'retnet',
    'gla',
    'rwkv4',
    'rwkv_channel_mix',
    'moe_switch',
    'moe_mamba_all',
    'large_kernel',
    'hyena',
    'hyena_modal',
    'rwkv6',
    'rwkv7',
)
NOISE = {
    'conba.process_noise': 0.1, 'conba.observation_noise': 0.1, 'conba.control': 'none', 'conba.delay': 'none'
}  # fmt: skip
# Two rows: documents that start on the borders of 2, 4 and 8 shards, and off them, with padding after the last.
DOCUMENTS = ([8, 8, 4, 12], [3, 1, 15, 9])


def documents(length=T):
    """Segment ids and positions."""
    rows = [packed_context(lengths, length) for lengths in DOCUMENTS]
    return [jnp.concatenate([getattr(row, name) for row in rows]) for name in ('segment_ids', 'positions')]


def mesh(shards):
    config = configs.default().mesh
    config.context = shards
    return make_mesh(config, jax.devices()[:shards])


@functools.cache
def parameters(name):
    """A layer's structure, its parameters and the rest; noise comes with an initial layer of its own."""
    module = layer(name) if name != 'conba_noise' else Conba(model_config(NOISE), Parameters(jax.random.key(0)), 4)
    return nnx.split(module, nnx.Param, ...)


def arguments(name, length=T):
    x, cotangent = jax.random.normal(jax.random.key(2), (2, len(DOCUMENTS), length, DIM))
    return parameters(name)[1], x, cotangent, *documents(length)


@functools.cache
def compiled(name, shards, length=T):
    """``(params, x, cotangent, segment_ids, positions) -> (loss, (y, aux)), gradients`` for so many devices."""
    graphdef, _, rest = parameters(name)
    on = mesh(shards)

    def run(params, x, cotangent, segment_ids, positions):
        context = Context(segment_ids, positions, rng=jax.random.key(3), train=True)
        with jax.sharding.use_abstract_mesh(on.abstract_mesh):
            y, _, aux = nnx.merge(graphdef, params, rest)(x, context, None)
        y = jnp.where(context.mask[..., None], y, 0)
        losses = sum(jax.tree.leaves(aux.get('losses', {})), 0.0)
        return jnp.sum(y * cotangent) + losses, (y, aux)

    graded = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    split = NamedSharding(on, PartitionSpec(None, 'context'))
    everywhere = NamedSharding(on, PartitionSpec())
    run = jax.jit(
        graded,
        in_shardings=(everywhere, split, split, everywhere, everywhere),
        out_shardings=((None, (split, None)), (everywhere, split)),
    )
    return run.lower(*arguments(name, length)).compile()


@functools.cache
def found(name, shards):
    place = lambda x, sharding: jax.tree.map(jax.device_put, x, sharding)
    run, args = compiled(name, shards), arguments(name)
    (_, outputs), gradients = run(*place(args, run.input_shardings[0]))
    return jax.device_get((outputs, gradients))


CASES = [(name, shards) for name in PRESETS for shards in (2, 4, 8)] + [(name, 4) for name in OTHERS + FAMILY]
# Each number of shards compiles anew: one is always run. All are of the scan by itself, and so is what other forms than
# the default add, such as feedback, a diagonal gain or noise: tests/kernels_pallas/test_context_parallel.py.
DEAR = {(name, shards) for name in PRESETS for shards in (2, 8)}
DEAR |= {(name, 4) for name in ('conba_paper', 'conba_code', 'conba_diag', 'conba_companion', 'conba_noise', *FAMILY)}


@pytest.mark.parametrize(
    'name, shards', [pytest.param(*case, marks=pytest.mark.slow) if case in DEAR else case for case in CASES]
)
def test_shards_equal_one_device(name, shards):
    """Outputs, statistics and losses, and the gradients of inputs and parameters."""
    pairs = zip(jax.tree.leaves_with_path(found(name, shards)), jax.tree.leaves(found(name, 1)), strict=True)
    for (path, got), want in pairs:
        error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
        assert error < 1e-5, f'{jax.tree_util.keystr(path)} differs by {error:.1e} of its largest value'


@pytest.mark.parametrize(
    'name', [name if name == 'mamba' else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_what_shards_exchange_does_not_grow_with_the_sequence(name):
    """Counted in the compiled gradient: as many collectives of as many bytes for twice the tokens."""
    short, long = (collectives(compiled(name, 4, length).as_text()) for length in (T, 2 * T))
    assert short == long and of_sequence(short) > 0


def test_a_state_goes_in_and_comes_out_whole():
    """A prompt in two pieces, the second context parallel, the state from one device."""
    graphdef, variables = nnx.split(layer('conba'))
    x = jax.random.normal(jax.random.key(4), (2, T, DIM))
    run = lambda x, context, state: nnx.merge(graphdef, variables)(x, context, state)[:2]

    def on_two(x, context, state):
        with jax.sharding.use_abstract_mesh(mesh(2).abstract_mesh):
            return run(x, context, state)

    half, rest = Context.whole(2, T // 2), Context.whole(2, T // 2, T // 2)
    _, state = jax.jit(run)(x[:, : T // 2], half, layer('conba').init_state(2, T))
    want = jax.jit(run)(x[:, T // 2 :], rest, state)
    got = jax.jit(on_two, out_shardings=NamedSharding(mesh(2), PartitionSpec()))(x[:, T // 2 :], rest, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
