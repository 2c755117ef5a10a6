"""Switch and MoE-Mamba against loops over tokens: ReLU experts, room for tokens, experts inside Mamba, its sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax.models import presets
from mixcon_jax.models.accounting import flops_per_token, parameter_count
from mixcon_jax.models.block import Residual
from mixcon_jax.models.context import Context
from mixcon_jax.models.ffns.moe import MoE
from mixcon_jax.models.layers import Parameters
from mixcon_jax.models.mixers.moe_mamba import MoEMamba
from tests.models.cases import DIM, model_config, packed_context, perturbed

LENGTH = 20
DOCUMENTS = ([9, 8], [20], [3, 1, 12])


def build(kind=MoE, **options):
    config = model_config({f'{"" if "." in key else "moe."}{key}': value for key, value in options.items()})
    return perturbed(kind(config, Parameters(jax.random.key(0)), 4), 1)


def batch(seed=3, train=True):
    rows = [packed_context(lengths, LENGTH) for lengths in DOCUMENTS]
    ids, positions = (jnp.concatenate([getattr(row, n) for row in rows]) for n in ('segment_ids', 'positions'))
    x = jax.random.normal(jax.random.key(seed), (len(rows), LENGTH, DIM))
    return x.at[..., 0].set(1), Context(ids, positions, train=train)


def wide(variable):
    return np.asarray(variable[...], np.float64)


def relu_expert(bank, expert, x):
    return np.maximum(x @ wide(bank.w_up)[expert], 0) @ wide(bank.w_down)[expert]


def routed(module, x, context, capacity):
    """The expert of every token, its probability and whether it has room: one token after another, row by row."""
    router = wide(module.router)
    room = max(1, np.floor(capacity * int(context.mask.sum()) / router.shape[1] + 1e-9)) if capacity else np.inf
    used, found = np.zeros(router.shape[1], int), {}
    for b, t in np.argwhere(np.asarray(context.mask)):
        p = np.exp(x[b, t] @ router)
        expert = int(np.argmax(p))
        found[b, t] = expert, p[expert] / p.sum(), used[expert] < room
        used[expert] += 1
    return found


@pytest.mark.parametrize('implementation', ['dense', 'grouped'])
@pytest.mark.parametrize('capacity', [0.0, 0.45])
def test_switch_is_a_loop_over_tokens_with_room_for_the_first_of_each_expert(implementation, capacity):
    module = build(expert='relu', top_k=1, expert_capacity=capacity, implementation=implementation, group_block=4)
    x, context = batch()
    y, _, aux = module(x, context, None)
    found = routed(module, np.asarray(x, np.float64), context, capacity)
    want, dropped = np.zeros(x.shape), 0
    for (b, t), (expert, p, has_room) in found.items():
        want[b, t] = p * relu_expert(module, expert, np.asarray(x[b, t], np.float64)) if has_room else 0
        dropped += not has_room
    np.testing.assert_allclose(np.where(context.mask[..., None], y, 0), want, rtol=1e-4, atol=1e-5)
    assert bool(dropped) == bool(capacity)
    np.testing.assert_allclose(aux['stats']['moe_dropped'], dropped / len(found), rtol=1e-6)
    load = np.bincount([expert for expert, _, _ in found.values()], minlength=4) / len(found)
    np.testing.assert_allclose(aux['stats']['moe_load'], load, rtol=1e-6)
    assert aux['losses']['balance'].weight == 0.01


def test_only_training_drops_and_only_a_row_before_or_an_earlier_token_takes_room():
    module = build(expert='relu', top_k=1, expert_capacity=0.5)
    x, context = batch()
    run = jax.jit(lambda x, context: module(x, context, None)[0])
    scored = run(x, batch(train=False)[1])
    np.testing.assert_allclose(scored, build(expert='relu', top_k=1)(x, context, None)[0], rtol=1e-5, atol=1e-6)
    before, after = run(x, context), run(x.at[1, 8:].set(-x[1, 8:]), context)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1, :8], after[1, :8])
    assert np.abs(before[2] - after[2]).max() > 0  # as in every implementation of Switch


def test_both_forms_have_the_same_gradients_where_tokens_are_dropped():
    x, context = batch()

    def gradient(implementation):
        module = build(
            expert='relu', top_k=2, expert_capacity=0.7, shared_experts=1, implementation=implementation, group_block=4
        )
        graphdef, params = nnx.split(module, nnx.Param)

        def loss(params, x):
            y, _, aux = nnx.merge(graphdef, params)(x, context, None)
            return jnp.sum(jnp.where(context.mask[..., None], jnp.sin(y), 0)) + aux['losses']['balance'].value

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    found, want = gradient('grouped'), gradient('dense')
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, want)


PROJECTIONS = [('conv',), ('gate', 'output'), ('conv', 'gate', 'output')]
ALONE = [pytest.param(one, marks=pytest.mark.slow) for one in (('gate',), ('output',))]


@pytest.mark.parametrize('projections', PROJECTIONS + ALONE, ids='+'.join)
def test_experts_inside_mamba_take_the_place_of_its_projections_with_one_router(projections):
    options = {'moe_mamba.projections': projections, 'expert': 'relu', 'top_k': 1}
    module = build(MoEMamba, **options)
    x, context = batch(train=False)
    choice = routed(module, np.asarray(x, np.float64), context, 0)

    def projected(name, matrix, x, half):
        x = np.asarray(x, np.float64)
        if name not in projections:
            return x @ (wide(matrix)[:, half] if half is not None else wide(matrix))
        bank, out = getattr(module, f'{name}_experts'), None
        for (b, t), (expert, p, _) in choice.items():
            y = p * relu_expert(bank, expert, x[b, t])
            out = np.zeros((*x.shape[:2], len(y))) if out is None else out
            out[b, t] = y
        return out

    both = hasattr(module, 'in_proj')
    matrix = lambda name: module.in_proj if both else getattr(module, f'{name}_proj', None)
    u = projected('conv', matrix('conv'), x, slice(0, 2 * DIM) if both else None)
    z = projected('gate', matrix('gate'), x, slice(2 * DIM, None) if both else None)
    y, _ = module.scanned(jnp.asarray(u, jnp.float32), jnp.asarray(z, jnp.float32), context, None)
    want = projected('output', getattr(module, 'out_proj', None), y, None)
    found = module(x, context, None)[0]
    mask = np.asarray(context.mask)[..., None]
    np.testing.assert_allclose(np.where(mask, found, 0), np.where(mask, want, 0), rtol=2e-4, atol=2e-5)


def test_a_pattern_has_mamba_and_experts_in_turn_and_side_by_side():
    """x += mamba(norm x), then x += moe(norm x); or x += mamba(norm x) + moe(norm x)."""
    x, context = batch(train=False)
    for spec in ('mamba+moe', 'mamba|moe'):
        config = model_config({'pattern': (spec,), 'moe.expert': 'relu', 'moe.top_k': 1})
        module = perturbed(Residual(config, spec, Parameters(jax.random.key(0)), 4), 1)
        normed = module.mixer_norm(x)
        y = x + module.mixer(normed, context, None)[0]
        y = y + module.ffn(normed if '|' in spec else module.ffn_norm(y), context, None)[0]
        np.testing.assert_allclose(module(x, context, None)[0], y, rtol=1e-5, atol=1e-5)


# Parameters without embedding and head, in millions, as printed: in total, and those that a token uses.
PUBLISHED = {
    'moe-mamba-25m': (542, 26), 'moe-mamba-100m': (2439, 117), 'mamba-25m': (27, 27), 'mamba-100m': (121, 121),
    'transformer-moe-25m': (545, 25), 'transformer-moe-100m': (2454, 114),
}  # fmt: skip


@functools.cache
def size(name):
    config = configs.default()
    config.model.update(presets.moe_mamba(name))
    return configs.validate(config).model


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_published_sizes(name):
    model, counts = size(name), parameter_count(size(name))
    assert counts.embedding == 2 * 50257 * model.dim
    found = [round((count - counts.embedding) / 1e6) for count in (counts.total, counts.active)]
    assert found == list(PUBLISHED[name])
    if name.startswith('moe'):  # an expert of 6 D^2, as many as a Mamba layer's matrices
        experts = 2 * model.dim * model.moe.hidden_dim
        assert experts == 6 * model.dim**2
        layers = model.num_blocks
        mamba = counts.active - counts.embedding - model.dim - layers * (experts + 42 * model.dim + 2 * model.dim)
        assert counts.total - counts.active == layers * 41 * experts
        config = configs.default()
        config.model.update(presets.moe_mamba(name.removeprefix('moe-')) | {'num_blocks': layers})
        plain = parameter_count(configs.validate(config).model)
        assert mamba == plain.total - plain.embedding - model.dim - layers * model.dim


def test_experts_inside_mamba_are_counted_as_a_token_uses_them():
    """At the width that makes an expert as large as its projection a token uses Mamba's parameters and the router."""
    counts, flops = {}, {}
    for name, options in {
        'mamba': {'pattern': ('mamba',)},
        'moe_mamba': {'pattern': ('moe_mamba',), 'moe_mamba.projections': ('conv', 'gate', 'output')},
    }.items():
        model = model_config(options | {'dim': 48, 'moe.expert': 'relu', 'moe.top_k': 1, 'moe.num_experts': 6})
        counts[name], flops[name] = parameter_count(model), flops_per_token(model, 64)
    router = 48 * 6
    assert counts['moe_mamba'].active == counts['mamba'].active + router
    assert counts['moe_mamba'].total == counts['moe_mamba'].active + 5 * 3 * 2 * 48 * 48
    assert flops['moe_mamba'] == flops['mamba'] + 3 * 2 * router
