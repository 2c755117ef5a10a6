"""Experts on meshes: outputs, statistics, losses and gradients are one device's, however tokens are routed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax.errors import ConfigError
from mixcon_jax.models.context import Context
from mixcon_jax.models.ffns.moe import MoE
from mixcon_jax.models.layers import Parameters
from mixcon_jax.parallel.axes import rules
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.parallel.rules import on_mesh
from tests.models.cases import DIM, model_config, packed_context, perturbed

ROUTINGS = ('random', 'skewed', 'one')
DOCUMENTS = ([8, 8, 4], [3, 1, 12], [16], [20], [5, 5], [1], [20], [2, 17])
LENGTH = 20


@functools.cache
def structure(**options):
    config = model_config({'moe.implementation': 'grouped', 'moe.group_block': 4, 'moe.router_z_coef': 0.1} | options)
    return nnx.split(perturbed(MoE(config, Parameters(jax.random.key(0)), 4), 1), nnx.Param, ...)


def routed(params, routing):
    """Parameters whose router sends tokens anywhere; each expert fewer than the one before; nearly all to the first."""
    router = params['router'][...]
    bias = {'random': 0.0, 'skewed': 6.0, 'one': 50.0}[routing] * jnp.arange(router.shape[1], 0, -1) ** 0.5
    params = jax.tree.map(lambda x: x, params)
    params['router'][...] = router.at[0].set(bias)  # the first feature is 1 in every token
    return params


@functools.cache
def compiled(mesh=(), changes=(), **options):
    """``params -> (loss, (y, aux)), gradients`` of parameters and tokens, on a mesh of these axes."""
    graphdef, _, rest = structure(**options)
    config = configs.default().mesh
    config.update({'data': 1} | dict(mesh))
    config.rules = changes
    on = make_mesh(config, jax.devices()[: int(np.prod([size for _, size in mesh]))])
    rows = [packed_context(lengths, LENGTH) for lengths in DOCUMENTS]
    segment_ids, positions = (jnp.concatenate([getattr(row, n) for row in rows]) for n in ('segment_ids', 'positions'))
    x, dy = jax.random.normal(jax.random.key(2), (2, len(rows), LENGTH, DIM))

    def loss(params, x):
        with on_mesh(on, rules(config)):
            y, _, aux = nnx.merge(graphdef, params, rest)(x, Context(segment_ids, positions, train=True), None)
        y = jnp.where(segment_ids[..., None] > 0, y, 0)
        return jnp.sum(y * dy) + sum(10 * loss.value for loss in aux['losses'].values()), (y, aux)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    everywhere = jax.NamedSharding(on, jax.P())
    place = lambda tree: jax.tree.map(lambda value: jax.device_put(value, everywhere), tree)
    return lambda params: jax.device_get(run(place(params), place(x.at[..., 0].set(1))))


def found(routing, mesh=(), changes=(), **options):
    return compiled(mesh, changes, **options)(routed(structure(**options)[1], routing))


def assert_same(got, want):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name, largest = jax.tree_util.keystr(path), np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * largest, err_msg=name)


EIGHT, SIXTEEN = {'moe.num_experts': 8, 'moe.shared_experts': 1}, {'moe.num_experts': 16, 'moe.renormalize': True}
SWITCH = {'moe.num_experts': 8, 'moe.top_k': 1, 'moe.expert': 'relu', 'moe.expert_capacity': 1.0}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CASES = [
    ((('data', 2), ('expert', 2), ('tensor', 2)), (), EIGHT),
    slow((('context', 2), ('expert', 4)), (), EIGHT),
    slow((('expert', 8),), (), EIGHT),
    slow((('expert', 8),), (), SIXTEEN),
    slow((('fsdp', 2), ('expert', 4)), ('experts=fsdp+expert',), SIXTEEN),
    slow((('fsdp', 2), ('expert', 2), ('tensor', 2)), ('experts=', 'mlp='), EIGHT),
    slow((('data', 2), ('expert', 2), ('tensor', 2)), (), SWITCH),
    slow((('context', 2), ('expert', 4)), (), SWITCH),
]


@pytest.mark.parametrize('mesh, changes, options', CASES)
def test_meshes_agree_with_one_device_and_with_every_expert_on_every_token(mesh, changes, options):
    for routing in ROUTINGS:
        want, got = found(routing, **options), found(routing, mesh, changes, **options)
        dense = found(routing, **options | {'moe.implementation': 'dense'})
        assert_same(got, want)
        assert_same(dense, want)
        load = want[0][1][1]['stats']['moe_load']
        assert {'random': load.max() < 0.3, 'skewed': load.max() > 0.3, 'one': load.max() > 0.49}[routing], load
        assert (got[0][1][1]['stats']['moe_dropped'] > 0) == ('moe.expert_capacity' in options)
    gradients = jax.tree.leaves(found('random', **options)[1])
    assert all(np.abs(gradient).max() > 0 for gradient in gradients)


def test_what_finds_no_room_is_counted_and_left_out():
    """All to one of four devices, with room for an even load: of a long row three quarters go."""
    mesh, options = (('data', 2), ('expert', 4)), EIGHT | {'moe.capacity': 1.0, 'moe.top_k': 1, 'moe.shared_experts': 0}
    (_, (y, aux)), _ = found('one', mesh, **options)
    (_, (whole, _)), _ = found('one', **options)
    dropped = aux['stats']['moe_dropped']
    real = np.concatenate([packed_context(lengths, LENGTH).mask for lengths in DOCUMENTS])
    missing = real & ~np.any(y, axis=-1)
    np.testing.assert_allclose(dropped, missing.sum() / real.sum(), rtol=1e-6)
    # A device has one row of 20 tokens, and room for 5 of them on each of four devices.
    tokens = real.sum(axis=1)
    assert missing.sum() == np.maximum(tokens - 5, 0).sum() > 0
    np.testing.assert_allclose(y[~missing], whole[~missing], rtol=1e-4, atol=1e-5)


def test_ties_are_broken_alike_on_every_mesh():
    """A router of equal columns: every token takes the first experts, on one device and on eight."""
    for mesh in ((), (('data', 2), ('expert', 2), ('tensor', 2))):
        params = jax.tree.map(lambda x: x, structure(**EIGHT)[1])
        params['router'][...] = jnp.broadcast_to(params['router'][...][:, :1], params['router'].shape)
        stats = compiled(mesh, **EIGHT)(params)[0][1][1]['stats']
        np.testing.assert_allclose(stats['moe_load'], [0.5, 0.5, 0, 0, 0, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    'mesh, changes, where',
    [((('expert', 8),), (), 'cpu'), ((('fsdp', 2), ('expert', 4)), ('experts=fsdp+expert',), 'over fsdp and expert')],
)
def test_a_ragged_exchange_is_refused_where_it_cannot_be(mesh, changes, where):
    with pytest.raises(ConfigError, match=f"model.moe.exchange='ragged' is for GPUs.* {where}; choose 'padded'"):
        found('random', mesh, changes, **EIGHT | {'moe.exchange': 'ragged'})
