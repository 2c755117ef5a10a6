"""What bfloat16 models sum in float32: gradients of all that is shared by the tokens, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.models.context import Context
from mixcon_jax.models.ffns.mlp import swiglu
from mixcon_jax.models.layers import (
    Parameters,
    RMSNorm,
    gated,
    gated_halves,
    layer_norm,
    project_halves,
    rms_norm,
)
from mixcon_jax.models.mixers.conba import full_gate
from mixcon_jax.models.rotary import rotate
from tests.jaxprs import operations
from tests.models.cases import DIM, but_slow, layer

TOKENS = 16_384


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_the_gradient_of_a_norms_scale_is_summed_in_float32():
    """A bfloat16 sum of so many tokens stands still once it is 256 times what a token adds."""
    x, dy = jnp.asarray(normal(0, TOKENS, 8), jnp.bfloat16), jnp.asarray(1 + normal(1, TOKENS, 8), jnp.bfloat16)
    norm = RMSNorm(8, Parameters(jax.random.key(0)), 1e-6)
    graphdef, params = nnx.split(norm)
    run = lambda params, x: nnx.merge(graphdef, params)(x)
    dscale, dx = jax.jit(lambda params, x, dy: jax.vjp(run, params, x)[1](dy))(params, x, dy)
    wide, cotangent = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    inverse = 1 / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-6)
    normalized = wide * inverse
    want = np.sum(cotangent * normalized, 0)
    np.testing.assert_allclose(dscale['scale'][...], want, rtol=1e-5, atol=1e-3)
    want = inverse * (cotangent - normalized * np.mean(cotangent * normalized, -1, keepdims=True))
    np.testing.assert_allclose(np.asarray(dx, np.float64), want, rtol=2**-8, atol=2e-5)  # rounded once


def test_in_float32_the_norm_is_what_autodiff_makes_of_it():
    """Neither the recomputation nor another order of sums: runs on CPUs keep their bits."""
    x, scale = jnp.asarray(normal(0, 5, 8), jnp.float32), jnp.ones(8)
    primitives = {e.primitive.name for e, _ in operations(jax.make_jaxpr(jax.grad(rms_norm_sum))(x, scale).jaxpr)}
    assert not {name for name in primitives if 'remat' in name or 'checkpoint' in name or 'barrier' in name}


def rms_norm_sum(x, scale):
    return jnp.sum(rms_norm(x, scale, 1e-6))


def layer_norm_sum(x, scale, bias):
    return jnp.sum(layer_norm(x, scale, bias, 1e-6))


@pytest.mark.parametrize('name', but_slow())
def test_no_layer_sums_over_tokens_in_bfloat16(name):
    """By its traced gradient: a parameter's, the input's and a routing weight's sums have a float32 accumulator."""
    graphdef, params, rest = nnx.split(layer(name, 'bfloat16'), nnx.Param, ...)
    x = jax.ShapeDtypeStruct((2, 300, DIM), jnp.bfloat16)

    def loss(params, x):
        y, _, aux = nnx.merge(graphdef, params, rest)(x, Context.whole(2, 300), None)
        return jnp.sum(y.astype(jnp.float32)) + sum(value.value for value in aux.get('losses', {}).values())

    for operation, _ in operations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x).jaxpr):
        kind, first = operation.primitive.name, operation.invars[0].aval if operation.invars else None
        if kind in ('reduce_sum', 'cumsum') and first.dtype == jnp.bfloat16:
            assert first.size <= 4 * operation.outvars[0].aval.size, (
                f'{operation} at {operation.source_info.name_stack}'
            )


def test_swiglu_against_float64():
    """Output and gradients, each rounded as often as its products are."""
    drawn = [normal(seed, *shape) for seed, shape in enumerate([(64, 48), (64, 48), (48, 32), (64, 32)])]
    gate, up, weight, dy = (jnp.asarray(x / 4, jnp.bfloat16) for x in drawn)
    wide = [np.asarray(x, np.float64) for x in (gate, up, weight, dy)]
    got = jax.jit(lambda *args: pulled(swiglu, *args))(gate, up, weight, dy)
    with jax.enable_x64(True):
        want = pulled(lambda gate, up, weight: jax.nn.silu(gate) * up @ weight, *map(jnp.asarray, wide))
    for ours, oracle in zip(got, want, strict=True):
        assert ours.dtype == jnp.bfloat16 and oracle.dtype == jnp.float64
        error = np.abs(np.asarray(ours, np.float64) - np.asarray(oracle))
        assert error.max() < 2**-7 * np.abs(np.asarray(oracle)).max()


def pulled(function, *args):
    y, vjp = jax.vjp(function, *args[:-1])
    return y, *vjp(args[-1])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_joined_halves_are_gated_as_two_arrays_are(dtype):
    gate, up, dy = (jnp.asarray(normal(seed, 64, 48), dtype) for seed in range(3))
    want, *gradients = pulled(gated, gate, up, dy)
    got, joined = pulled(gated_halves, jnp.concatenate([gate, up], -1), dy)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(joined, jnp.concatenate(gradients, -1))


@pytest.mark.parametrize(
    'function, count', [(swiglu, 3), (gated, 2), (gated_halves, 1), (rms_norm_sum, 2), (layer_norm_sum, 3)]
)
def test_a_narrow_gradient_keeps_the_arguments_alone(function, count):
    norm = function in (rms_norm_sum, layer_norm_sum)
    shapes = ([(64, 48), (48,), (48,)] if norm else [(64, 48), (64, 48), (48, 32)])[:count]
    x, *others = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], x, *others))
    arguments = sorted(shapes)
    assert sorted(leaf.shape for leaf in kept if leaf.shape) == arguments
    assert all(leaf.dtype == jnp.bfloat16 for leaf in kept if leaf.shape)


def test_halves_of_a_projection_are_what_one_product_gives():
    """In bfloat16 x's gradient is rounded once, and the weight's is a float32 sum."""
    x, weight = normal(0, 2, 300, 48), normal(1, 48, 64) / 4
    gradients = [normal(seed, 2, 300, 32) for seed in (2, 3)]
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)):
        narrow = [jnp.asarray(value, dtype) for value in (x, weight, *gradients)]
        halves = lambda x, w: project_halves(x, nnx.Param(w), 'inner')
        (u, z), vjp = jax.vjp(halves, narrow[0], narrow[1].astype(jnp.float32))
        dx, dweight = vjp((narrow[2], narrow[3]))
        wide = [np.asarray(value, np.float64) for value in narrow]
        whole = np.concatenate(wide[2:], -1)
        want = np.split(wide[0] @ wide[1], 2, -1)
        for got, oracle in zip((u, z, dx), (*want, whole @ wide[1].T), strict=True):
            assert got.dtype == dtype
            assert np.abs(np.asarray(got, np.float64) - oracle).max() < tolerance * np.abs(oracle).max()
        oracle = np.einsum('bti,bto->io', wide[0], whole)
        assert dweight.dtype == jnp.float32
        assert np.abs(np.asarray(dweight, np.float64) - oracle).max() < 1e-5 * np.abs(oracle).max()


def test_conba_keeps_no_wide_array_of_its_tokens_between_scan_and_gain():
    """Scaling, taps, error and gate keep the narrow arrays that they start from."""
    mixer = layer('conba', 'bfloat16')
    tokens = jax.ShapeDtypeStruct((2, 40, mixer.inner), jnp.bfloat16)
    context = Context.whole(2, 40)

    def pullback(y, u, z):
        desired = mixer.control.reference_weight[...], mixer.control.reference_bias[...]
        shaped = lambda y, u: mixer._shaped(y, (u, *desired), context, None)
        gate = lambda y, z: full_gate(y, z, mixer.gate_output[...], mixer.gate_linear[...])
        return jax.vjp(shaped, y, u)[1], jax.vjp(gate, y, z)[1]

    leaves = jax.tree.leaves(jax.eval_shape(pullback, tokens, tokens, tokens))
    kept = [leaf for leaf in leaves if leaf.size >= tokens.size]
    assert len(kept) == 4 and all(leaf.dtype == jnp.bfloat16 for leaf in kept), kept


def test_rotary_positions_are_rounded_once():
    x = jnp.asarray(normal(20, 1, 64, 2, 16), jnp.bfloat16)
    positions = 1000 + jnp.arange(64)[None]
    found = rotate(x, positions, 1e4)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, rotate(x.astype(jnp.float32), positions, 1e4).astype(jnp.bfloat16))
