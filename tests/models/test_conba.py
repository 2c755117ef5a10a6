"""Conba against the literal control loop, its presets at their initial values, and every option away from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.models import presets
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters
from mixcon_jax.models.mixers.conba import Conba
from mixcon_jax.models.mixers.mamba import Mamba
from tests.models.cases import DIM, model_config, perturbed

T = 9


def build(options=(), seed=0):
    config = model_config({f'conba.{key}': value for key, value in dict(options).items()})
    return Conba(config, Parameters(jax.random.key(seed)), 4)


def apply(layer, x, context=None):
    return layer(x, context or Context.whole(*x.shape[:2]), None)[0]


def tokens(seed, length=T):
    return jax.random.normal(jax.random.key(seed), (2, length, DIM))


@pytest.mark.parametrize('preset', presets.CONBA_PRESETS)
def test_every_preset_starts_as_the_mamba_mixer_with_norms(preset):
    mamba = Mamba(model_config({'mamba.norms': True}), Parameters(jax.random.key(0)), 4)
    x = tokens(0)
    np.testing.assert_allclose(apply(build(presets.conba(preset)), x), apply(mamba, x), rtol=1e-5, atol=1e-6)


def literal_loop(layer, x):
    """Equations 8, 10 and 11 as printed (Figure 1), one sequence, one token after another.

    The gain steps down the gradient of half the squared corrected error along the error's direction, taken by autodiff;
    everything is a loop over tokens, and the loop is closed: the corrected drive makes the next state.
    """
    inputs = layer.inputs(*layer.halves(x[None]), Context.whole(1, len(x)), None)
    control, options = layer.control, layer.options
    law = control.law(x[None], inputs.u, Context.whole(1, len(x)))
    u_d, dt, B, C = (value[0] for value in (inputs.u, inputs.dt, inputs.B, inputs.C))
    dt = jax.nn.softplus(dt + layer.dt_bias[...])
    heads, width = control.heads, control.head_dim
    desired = (control.reference_weight[...] * u_d + control.reference_bias[...]).reshape(-1, heads, width)
    state = jnp.zeros((layer.inner, layer.d_state))
    gain = jnp.zeros((heads, width, width))
    outputs = []
    for k in range(len(x)):
        carried = jnp.exp(dt[k][:, None] * inputs.A) * state
        error = ((carried @ C[k]).reshape(heads, width)) - desired[k]
        drive = u_d[k] - (control.kappa[...][:, None] * jnp.einsum('hpq,hq->hp', gain, error)).reshape(-1)
        state = carried + (dt[k] * drive)[:, None] * B[k]
        y = state @ C[k] + layer.D[...] * drive
        direction = error / jnp.sqrt(jnp.sum(error**2, -1, keepdims=True) + 1e-6)
        forgotten = jnp.exp(law.log_decay[0, k])[:, None, None] * gain
        energy = lambda g, phi=direction: 0.5 * jnp.sum((phi - jnp.einsum('hpq,hq->hp', g, phi)) ** 2)
        gain = forgotten - law.alpha[0, k][:, None, None] * jax.grad(energy)(forgotten)
        if options.state_scaling == 'output':
            y = y * jax.nn.silu(layer.scale_weight[...] * y + layer.scale_bias[...])
        outputs.append(y)
    taps = []
    for k in range(len(x)):
        past = [layer.taps[i] * outputs[k - lag] for i, lag in enumerate(options.taps) if k >= lag]
        taps.append(sum(past, outputs[k]))
    y, z = jnp.stack(taps), inputs.z[0]
    gate = jax.nn.silu(layer.gate_output[...] * y + z)
    return (gate * (y + layer.gate_linear[...] * z)) @ layer.out_proj[...]


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
def test_feedback_passes_converge_to_the_literal_closed_loop(seed):
    """Each pass is exact for one more token, and the error falls with the passes (docs/conba.md)."""
    x = tokens(seed)[0]
    errors = []
    for passes in (1, 2, 4, 8):
        layer = perturbed(build({'feedback_iters': passes}, seed), seed + 1)
        layer.control.kappa[...] = jnp.full_like(layer.control.kappa[...], 0.3)
        expected = literal_loop(layer, x)
        errors.append(float(jnp.abs(apply(layer, x[None])[0] - expected).max() / jnp.abs(expected).max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    assert errors[0] > 1e-4


OPTIONS = {
    'state_scaling': ['none', 'output', 'readout'],
    'delay': ['none', 'taps', 'companion', 'state'],
    'control': ['none', 'slow', 'diag', 'matrix'],
    'reference': ['zero', 'diag', 'proj'],
    'kappa': ['free', 'bounded'],
    'gate': ['mamba', 'full'],
    'feedback_iters': [0, 1, 2],
}


@pytest.mark.parametrize('option', OPTIONS)
def test_away_from_the_initial_values_every_option_changes_the_output(option):
    x = tokens(3)
    results = [apply(perturbed(build({option: value}), 5), x) for value in OPTIONS[option]]
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert jnp.abs(a - b).max() > 1e-4 * jnp.abs(a).max()


GRADIENT_CASES = {
    'conba': presets.conba('conba'),
    'conba_paper': presets.conba('conba_paper'),
    'conba_code': presets.conba('conba_code'),
    'companion_proj_diag': {'delay': 'companion', 'control': 'diag', 'reference': 'proj', 'kappa': 'bounded'},
    'noise': {'process_noise': 0.1, 'observation_noise': 0.1},
}


@pytest.mark.parametrize('name', GRADIENT_CASES)
def test_away_from_the_initial_values_every_parameter_gets_a_gradient(name):
    graphdef, params = nnx.split(perturbed(build(GRADIENT_CASES[name]), 7), nnx.Param)
    context = Context.whole(2, T)
    context = Context(context.segment_ids, context.positions, rng=jax.random.key(1), train=True)
    weights = jax.random.normal(jax.random.key(2), (2, T, DIM))
    grads = jax.jit(jax.grad(lambda params: jnp.vdot(apply(nnx.merge(graphdef, params), tokens(4), context), weights)))(
        params
    )
    for path, grad in nnx.to_flat_state(grads):
        assert jnp.isfinite(grad[...]).all(), path
        assert jnp.abs(grad[...]).max() > 0, path


def test_from_the_initial_values_two_steps_reach_every_part_of_the_gain():
    """kappa starts at zero: it gets the first gradient, and everything behind it the second."""
    graphdef, params = nnx.split(build(), nnx.Param)
    weights = jax.random.normal(jax.random.key(2), (2, T, DIM))
    loss = lambda params: jnp.vdot(apply(nnx.merge(graphdef, params), tokens(4)), weights)
    gradient = jax.jit(jax.grad(loss))
    first = gradient(params)
    assert jnp.abs(first['control']['kappa'][...]).max() > 0
    second = gradient(jax.tree.map(lambda p, g: p - 0.1 * g, params, first))
    for name, grad in second['control'].items():
        assert jnp.abs(grad[...]).max() > 0, name


def test_noise_is_for_training_only_and_follows_its_key():
    layer = perturbed(build({'process_noise': 0.5, 'observation_noise': 0.5}), 9)
    x, quiet = tokens(5), Context.whole(2, T)
    noisy = functools.partial(Context, quiet.segment_ids, quiet.positions, train=True)
    evaluation = Context(quiet.segment_ids, quiet.positions, rng=jax.random.key(0))
    np.testing.assert_array_equal(apply(layer, x, evaluation), apply(layer, x, quiet))
    a, b = (apply(layer, x, noisy(rng=jax.random.key(seed))) for seed in (0, 1))
    assert jnp.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(a, apply(layer, x, noisy(rng=jax.random.key(0))))


@pytest.mark.parametrize('seed', range(3))
def test_bounded_gain_never_makes_the_error_larger(seed):
    """With kappa in [0, 1] and a unit spectral norm of I - K, |e - kappa K e| <= |e| (zero reference)."""
    layer = perturbed(build({'kappa': 'bounded', 'reference': 'zero'}, seed), seed, scale=1.0)
    y = 3 * jax.random.normal(jax.random.key(seed), (2, 40, layer.inner))
    context = Context.whole(2, 40)
    law = layer.control.law(tokens(seed, 40), y, context)
    correction, _, _ = layer.control.correction(y, law, context, None, 0)
    heads = lambda value: jnp.linalg.norm(value.reshape(2, 40, -1, layer.control.head_dim), axis=-1)
    assert (heads(y - correction) <= heads(y) * (1 + 1e-5)).all()


def test_rows_of_padding_have_no_part_in_statistics():
    layer, x = perturbed(build({'control': 'diag'}), 1), tokens(0)
    real, both = Context.whole(1, T), Context(jnp.asarray([[1] * T, [0] * T]), jnp.stack([jnp.arange(T)] * 2))
    stats = [layer(x[: len(each.mask)], each, None)[2]['stats'] for each in (real, both)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *stats)
