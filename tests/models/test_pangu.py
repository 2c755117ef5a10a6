"""PanGu-pi's additions: nothing at first, what the paper says then, and exactly their parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.models.accounting import parameter_count
from mixcon_jax.models.block import Residual
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import create
from mixcon_jax.models.layers import Parameters
from mixcon_jax.trees import map_named, named_leaves
from tests.models.cases import DIM, layer, model_config, perturbed

PLAIN = {'pattern': ('mamba+mlp', 'attention|mlp'), 'num_blocks': 2, 'init_std': 0.2}
SERIES = {'pattern': ('mamba+series_mlp', 'attention|series_mlp')}
SHORTCUT = {'shortcut.reduction': 8}
ADDED = {'series': {'scale', 'bias'}, 'shortcut': {'w_in', 'w_out'}, 'both': {'scale', 'bias', 'w_in', 'w_out'}}
OPTIONS = {'series': SERIES, 'shortcut': SHORTCUT, 'both': SERIES | SHORTCUT}


def added(name):
    parts = name.split('/')
    return 'shortcut' in parts or parts[-2:] in (['ffn', 'scale'], ['ffn', 'bias'])


def outputs_and_gradients(options, step=0.0):
    """Features, and the gradients by name, of a model as it starts, or after a step of its additions of this rate."""
    config = model_config(PLAIN | options)
    graphdef, params, rest = nnx.split(create(config), nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(1), (2, 11), 0, config.vocab_size)
    cotangent = jax.random.normal(jax.random.key(2), (2, 11, DIM))

    @jax.jit
    def run(params):
        y, pullback = jax.vjp(lambda params: nnx.merge(graphdef, params, rest)(tokens, Context.whole(2, 11))[0], params)
        return y, pullback(cotangent)[0]

    y, gradients = run(params)
    if step:
        taken = lambda name, x, dx: x - step * dx if added(name.removesuffix('/value')) else x
        y, gradients = run(map_named(taken, params, gradients))
    return np.asarray(y), {name.removesuffix('/value'): x for name, x in named_leaves(gradients).items()}


@pytest.fixture(scope='module')
def plain():
    return outputs_and_gradients({})


# Each addition alone is left to `make test-all`.
APART = [pytest.param(name, marks=[] if name == 'both' else pytest.mark.slow) for name in OPTIONS]


@pytest.mark.parametrize('name', APART)
def test_at_first_a_model_is_the_one_without_and_learns_to_differ(name, plain):
    y, gradients = outputs_and_gradients(OPTIONS[name])
    np.testing.assert_allclose(y, plain[0], rtol=1e-5, atol=1e-5 * np.abs(plain[0]).max())
    for parameter, gradient in plain[1].items():
        np.testing.assert_allclose(gradients[parameter], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())
    more = gradients.keys() - plain[1].keys()
    assert {parameter.rsplit('/', 1)[1] for parameter in more} == ADDED[name]
    grown = {parameter.rsplit('/', 1)[1] for parameter in more if np.any(gradients[parameter])}
    assert grown == ADDED[name] - {'w_in'}, 'w_in learns once w_out has'
    assert np.abs(outputs_and_gradients(OPTIONS[name], 0.1)[0] - y).max() > 0.01 * np.abs(y).max()


def test_the_series_is_the_sum_of_its_activations():
    """Against a loop over channels in float64, away from the initial values."""
    ffn = layer('series_mlp')
    x = np.asarray(jax.random.normal(jax.random.key(3), (1, 5, DIM)), np.float64)
    gate, up, down = (np.asarray(w[...], np.float64) for w in (ffn.w_gate, ffn.w_up, ffn.w_down))
    scale, bias = (np.asarray(w[...], np.float64) for w in (ffn.scale, ffn.bias))
    want = np.zeros((5, DIM))
    for channel in range(gate.shape[1]):
        g = x[0] @ gate[:, channel]
        phi = sum((z := a * g + b) / (1 + np.exp(-z)) for a, b in zip(scale[:, channel], bias[:, channel], strict=True))
        want += np.outer(phi * (x[0] @ up[:, channel]), down[channel])
    got = ffn(jnp.asarray(x, jnp.float32), Context.whole(1, 5), None)[0]
    np.testing.assert_allclose(got[0], want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


def test_the_shortcut_is_a_narrow_network_around_the_mixer():
    """A layer with it less the same without is W_out GELU(W_in norm x)."""
    config = model_config({'pattern': ('attention',), 'init_std': 0.3} | SHORTCUT)
    residual = perturbed(Residual(config, 'attention', Parameters(jax.random.key(0)), 1), seed=5)
    x = jax.random.normal(jax.random.key(4), (2, 7, DIM))
    with_it = residual(x, Context.whole(2, 7), None)[0]
    shortcut, residual.shortcut = residual.shortcut, None
    without = residual(x, Context.whole(2, 7), None)[0]
    w_in, w_out, z = (
        np.asarray(a, np.float64) for a in (shortcut.w_in[...], shortcut.w_out[...], residual.mixer_norm(x))
    )
    assert w_in.shape == (DIM, DIM // 8)
    hidden = z @ w_in
    want = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) @ w_out
    np.testing.assert_allclose(with_it - without, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_parameters_are_counted():
    model = {'pattern': ('attention+mlp', 'conba+mlp'), 'num_blocks': 3}
    plain = parameter_count(model_config(model))
    series = parameter_count(model_config(model | {'pattern': ('attention+series_mlp', 'conba+series_mlp')}))
    around = parameter_count(model_config(model | {'shortcut.reduction': 32}))
    layers, hidden = 6, model_config(model).mlp.hidden_dim
    assert series.total - plain.total == layers * 2 * 2 * hidden
    assert around.total - plain.total == layers * 2 * DIM * math.ceil(DIM / 32)
