"""Experts: each form against a loop over tokens, the balance loss against its formula, padding left out."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.grouped_matmul import grouped_matmul
from mixcon_jax.models.context import Context
from mixcon_jax.models.expert_products import products
from mixcon_jax.models.ffns.moe import MoE
from mixcon_jax.models.layers import Parameters
from mixcon_jax.models.routed import Choice
from tests.models.cases import DIM, model_config, packed_context, perturbed

FORMS = ('dense', 'grouped', 'single')


def build(seed=0, **options):
    config = model_config({f'moe.{key}': value for key, value in options.items()})
    return perturbed(MoE(config, Parameters(jax.random.key(seed)), 4), seed + 1)


def loop(layer, x, context):
    """One token after another, one expert after another, in float64."""
    options = layer.moe
    router, gate, up, down = (
        np.asarray(w[...], np.float64) for w in (layer.router, layer.w_gate, layer.w_up, layer.w_down)
    )
    y = np.zeros(x.shape)
    chosen, probabilities = [], []
    for b, t in np.ndindex(*x.shape[:2]):
        if not context.mask[b, t]:
            continue
        token = np.asarray(x[b, t], np.float64)
        p = np.exp(token @ router - (token @ router).max())
        p /= p.sum()
        bias = np.asarray(layer.router_bias[...]) if options.balance == 'bias' else 0
        picks = np.argsort(-(p + bias))[: options.top_k]
        weights = p[picks] / (p[picks].sum() if options.renormalize else 1)
        for expert, weight in zip(picks, weights, strict=True):
            hidden = token @ gate[expert]
            hidden = hidden / (1 + np.exp(-hidden)) * (token @ up[expert])
            y[b, t] += weight * (hidden @ down[expert])
        chosen.append(picks)
        probabilities.append(p)
    return y, np.array(chosen), np.array(probabilities)


@pytest.mark.parametrize('implementation', FORMS)
@pytest.mark.parametrize(
    'options', [{}, {'renormalize': True, 'top_k': 1}, {'balance': 'bias', 'num_experts': 7}], ids=str
)
def test_outputs_losses_and_statistics_equal_a_loop_over_tokens(implementation, options):
    layer = build(implementation=implementation, group_block=4, **options)
    x = jax.random.normal(jax.random.key(3), (1, 15, DIM))
    context = packed_context([4, 7], 15)
    y, _, aux = layer(x, context, None)
    expected, chosen, probabilities = loop(layer, x, context)
    np.testing.assert_allclose(y[:, :11], expected[:, :11], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(y[:, 11:], 0)
    experts = layer.moe.num_experts
    load = np.bincount(chosen.ravel(), minlength=experts) / chosen.size
    np.testing.assert_allclose(aux['stats']['moe_load'], load, rtol=1e-6)
    np.testing.assert_allclose(
        aux['losses']['balance'].value, experts * np.sum(load * probabilities.mean(0)), rtol=1e-5
    )
    entropy = -(probabilities * np.log(probabilities)).sum(-1).mean()
    np.testing.assert_allclose(aux['stats']['moe_entropy'], entropy, rtol=1e-4)
    assert aux['stats']['moe_dropped'] == 0


def test_gate_and_up_are_kept_in_one_piece():
    """The backward pass keeps of the pairs' rows, in bfloat16: rows, first product, and what the second multiplies."""
    layer, rows = build(), 200
    sizes = jnp.full((layer.moe.num_experts,), rows // layer.moe.num_experts)
    matrices = {name: jnp.asarray(getattr(layer, name)[...], jnp.bfloat16) for name in ('w_gate', 'w_up', 'w_down')}
    width = matrices['w_down'].shape[1]
    pull = lambda x, matrices: jax.vjp(lambda *args: products(args[0], sizes, args[1]), x, matrices)[1]
    leaves = jax.tree.leaves(jax.eval_shape(pull, jax.ShapeDtypeStruct((rows, DIM), jnp.bfloat16), matrices))
    assert sorted(leaf.shape[1] for leaf in leaves if leaf.shape[:1] == (rows,)) == sorted([DIM, 2 * width, width])


@pytest.mark.parametrize('implementation', FORMS)
def test_shared_experts_are_added_with_weight_one(implementation):
    """Each of their widths is an expert of its own, that every token passes."""
    layer = build(implementation=implementation, group_block=4, shared_experts=2)
    x, context = jax.random.normal(jax.random.key(3), (1, 15, DIM)), packed_context([4, 7], 15)
    width = layer.w_gate.shape[2]
    gate, up, down = (np.asarray(w[...], np.float64) for w in (layer.shared_gate, layer.shared_up, layer.shared_down))
    assert gate.shape == up.shape == down.T.shape == (DIM, 2 * width)
    token, expected = np.asarray(x[0], np.float64), loop(layer, x, context)[0]
    for part in (slice(0, width), slice(width, None)):
        hidden = token @ gate[:, part]
        expected[0] += (hidden / (1 + np.exp(-hidden)) * (token @ up[:, part])) @ down[part]
    np.testing.assert_allclose(layer(x, context, None)[0][:, :11], expected[:, :11], rtol=1e-4, atol=1e-5)


def test_balance_loss_is_one_when_balanced_and_number_of_experts_when_collapsed():
    layer = build(num_experts=4, top_k=1)
    context = Context.whole(1, 8)
    even = jnp.log(jnp.eye(4)[jnp.arange(8) % 4] * 1e6 + 1)[None]
    for logits, expected in ((even, 1.0), (even[:, :1].repeat(8, 1), 4.0)):
        probabilities = jax.nn.softmax(logits)
        chosen = jnp.argmax(logits, -1)[..., None]
        choice = Choice(logits, probabilities, chosen, jnp.ones(chosen.shape), chosen >= 0)
        aux = layer.report(choice, context, choice.taken)
        np.testing.assert_allclose(aux['losses']['balance'].value, expected, rtol=1e-4)


def test_all_forms_have_the_same_gradients():
    x = jax.random.normal(jax.random.key(4), (2, 13, DIM))
    cotangent = jax.random.normal(jax.random.key(5), x.shape)

    def gradient(implementation):
        graphdef, params = nnx.split(build(implementation=implementation, group_block=4), nnx.Param)

        def loss(params, x):
            y, _, aux = nnx.merge(graphdef, params)(x, Context.whole(2, 13), None)
            return jnp.vdot(y, cotangent) + sum(loss.value for loss in aux['losses'].values())

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    found, *others = (jax.tree.leaves(gradient(form)) for form in FORMS)
    for other in others:
        for a, b in zip(found, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('expert', ['swiglu', 'relu'])
def test_a_token_by_itself_reads_its_own_experts_alone(expert):
    layer = build(num_experts=4, top_k=2, expert=expert)
    x, context = jax.random.normal(jax.random.key(7), (2, 1, DIM)), Context.whole(1, 1)
    for row in x[:, None]:
        before = layer(row, context, None)[0]
        others = jnp.ones(4, bool).at[layer.choose(row, context).chosen].set(False)
        matrices = [getattr(layer, name) for name in ('w_gate', 'w_up', 'w_down') if hasattr(layer, name)]
        held = [matrix[...] for matrix in matrices]
        for matrix in matrices:
            matrix[...] = jnp.where(others[:, None, None], jnp.nan, matrix[...])
        np.testing.assert_array_equal(layer(row, context, None)[0], before)
        for matrix, values in zip(matrices, held, strict=True):
            matrix[...] = values


@pytest.mark.parametrize('sizes', [[3, 0, 5, 2], [0, 0, 0, 13], [1, 1, 1, 1], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize('block', [1, 4, 64])
def test_blocked_product_equals_every_matrix_on_every_row(sizes, block):
    """Values and gradients, with empty groups and rows that belong to none."""
    x = jax.random.normal(jax.random.key(0), (13, 6))
    w = jax.random.normal(jax.random.key(1), (4, 6, 5))
    cotangent = jax.random.normal(jax.random.key(2), (13, 5))
    sizes = jnp.array(sizes)

    def run(implementation):
        def loss(x, w):
            y = grouped_matmul(x, w, sizes, block=block, implementation=implementation)
            return jnp.vdot(y, cotangent), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, w)

    for a, b in zip(jax.tree.leaves(run('blocked')), jax.tree.leaves(run('reference')), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bad_shapes_and_names_are_refused():
    product = inspect.unwrap(grouped_matmul)  # below the tests' own check of annotations
    x, w, sizes = jnp.zeros((3, 4)), jnp.zeros((2, 4, 6)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r'^grouped_matmul: x has shape \(1, 3, 4\), expected \[rows, width\]$'):
        product(x[None], w, sizes)
    with pytest.raises(ValueError, match=r'^grouped_matmul: w has shape \(2, 3, 6\), expected \(groups, 4, columns\)$'):
        product(x, w[:, :3], sizes)
    with pytest.raises(ValueError, match=r'^grouped_matmul: group_sizes has shape \(1,\), expected \(2,\)$'):
        product(x, w, sizes[:1])
    with pytest.raises(ValueError, match='available here: mosaic_gpu, blocked, reference'):
        product(x, w, sizes, implementation='fast')


@pytest.mark.parametrize('implementation', FORMS)
def test_renormalised_weights_sum_to_one_where_every_chosen_probability_is_zero(implementation):
    """Logits 200 apart: of the experts that the bias chooses, softmax over all leaves none above 0 in float32."""
    layer = build(
        implementation=implementation, num_experts=4, top_k=2, balance='bias', renormalize=True, group_block=4
    )
    router = np.zeros((DIM, 4), np.float32)
    router[0] = 200, 1, 0, 0.5
    layer.router[...], layer.router_bias[...] = jnp.asarray(router), jnp.asarray([-2.0, 1, 0, 1])
    x = jax.random.normal(jax.random.key(6), (1, 5, DIM)).at[..., 0].set(1)
    y, _, _ = layer(x, Context.whole(1, 5), None)
    expected, chosen, _ = loop(layer, x, Context.whole(1, 5))
    np.testing.assert_array_equal(np.sort(chosen), np.broadcast_to([1, 3], chosen.shape))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    if implementation == 'dense':  # the weights are the same
        gradient = jax.jit(jax.grad(lambda x: layer(x, Context.whole(1, 5), None)[0].sum()))(x)
        assert np.isfinite(gradient).all()
