"""Hyena and its modal form are the sums that their papers write, in float64; initial filters; bytes of state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.models import accounting, kinds
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters
from tests.models.cases import DIM, model_config, perturbed

T = 17
OPTIONS = {
    'hyena': {'max_len': 24, 'features': 5, 'filter_width': 8, 'frequency': 2.0, 'shift': 0.05},
    'hyena_modal': {},
}


def initial(name, order, seed=0, **options):
    options = OPTIONS[name] | {'order': order} | options
    config = model_config({'pattern': (name,)} | {f'{name}.{key}': value for key, value in options.items()})
    return kinds.load(name)(config, Parameters(jax.random.key(seed)), 4)


def weight(module, name):
    for part in name.split('/'):
        module = getattr(module, part)
    return np.asarray(module[...], np.float64)


def network(module, order, max_len=24, features=5, shift=0.05):
    """The filters [N - 1, L, D], channel by channel as the released code has them."""
    time, bands = np.linspace(0, 1, max_len), (features - 1) // 2
    wave = np.exp(-1j * np.linspace(1e-4, bands - 1, bands) * 2 * np.pi * np.arange(max_len)[:, None] / max_len)
    u = np.concatenate([time[:, None], wave.real, wave.imag], 1)
    for i in range(3):
        u = np.sin(weight(module, 'frequency') * (u @ weight(module, f'filter_w{i}') + weight(module, f'filter_b{i}')))
    deltas = np.linspace(np.log(1e-2) / 1.5, np.log(1e-2) / 0.3, DIM * (order - 1))
    filters = np.zeros((order - 1, max_len, DIM))
    for channel in range(DIM):
        for index in range(order - 1):
            window = np.exp(-time * abs(deltas[channel * (order - 1) + index])) + shift
            filters[index, :, channel] = u @ weight(module, 'filter_out')[index, :, channel] * window
    return filters


def waves(module, order):
    rate, angle, residue = np.log1p(np.exp(weight(module, 'decay'))), weight(module, 'angle'), weight(module, 'residue')
    poles, R = np.exp(-rate + 1j * angle), residue[:, 0] + 1j * residue[:, 1]
    return np.stack([[np.sum(R[i] * poles[i] ** t, 0).real for t in range(T)] for i in range(order - 1)])


def convolved(h, v):
    return np.stack([sum(h[k] * v[t - k] for k in range(t + 1)) for t in range(len(v))])


def written_out(module, x, filters):
    """One document of one row through the layer."""

    def branch(name):
        z = x @ weight(module, f'{name}_proj') + weight(module, f'{name}_bias')
        taps, bias = weight(module, f'{name}_conv/weight'), weight(module, f'{name}_conv/bias')
        return convolved(np.concatenate([taps[::-1], np.zeros((T, DIM))]), z) + bias

    z, skip = branch('v'), weight(module, 'skip')
    for index in reversed(range(len(filters))):
        z = z * branch(f'x{index + 1}')
        z = convolved(filters[index], z) + skip[index] * z
    return (branch('x0') * z) @ weight(module, 'o_proj') + weight(module, 'o_bias')


@pytest.mark.parametrize('name, filters', [('hyena', network), ('hyena_modal', waves)])
@pytest.mark.parametrize('order, seed', [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow), (3, 2)])
def test_a_layer_is_the_papers_sums(name, filters, order, seed):
    module = perturbed(initial(name, order, seed), seed + 1, 0.1)
    x = jax.random.normal(jax.random.key(seed + 2), (1, T, DIM))
    want = written_out(module, np.asarray(x[0], np.float64), filters(module, order))
    y, _, _ = module(x, Context.whole(1, T), None)
    np.testing.assert_allclose(y[0], want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_decoding_by_waves_is_the_convolution():
    """Token by token, from a state of a fixed size."""
    module = perturbed(initial('hyena_modal', 2, 3), 4, 0.1)
    x = jax.random.normal(jax.random.key(5), (1, T, DIM))
    want = written_out(module, np.asarray(x[0], np.float64), waves(module, 2))
    graphdef, variables = nnx.split(module)
    step = jax.jit(lambda x, context, state: nnx.merge(graphdef, variables)(x, context, state)[:2])
    state, y = module.init_state(1, T), []
    sizes = jax.tree.map(jnp.shape, state)
    for t in range(T):
        out, state = step(x[:, t : t + 1], Context.whole(1, 1, jnp.int32(t)), state)
        y.append(out[0, 0])
    assert jax.tree.map(jnp.shape, state) == sizes
    np.testing.assert_allclose(np.stack(y), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_filters_reach_no_further_than_they_are_made_for():
    """A model may read longer rows than its filters; what they say of a lag does not depend on how long a row is."""
    module = initial('hyena', 2)
    np.testing.assert_array_equal(module.taps(9), module.taps(99)[:, :9])
    assert module.taps(99).shape == (1, 24, DIM)


def test_what_waves_begin_as():
    module = initial('hyena_modal', 3, d_state=4)
    magnitude = np.exp(-np.log1p(np.exp(weight(module, 'decay'))))
    assert 0.899 < magnitude.min() < 0.91 and 0.99 < magnitude.max() < 0.9995
    assert weight(module, 'angle').min() >= 0 and weight(module, 'angle').max() < np.pi / 10
    assert len(np.unique(np.round(magnitude, 4))) > 200
    long = np.arange(20_000)[:, None, None, None]
    poles = magnitude * np.exp(1j * weight(module, 'angle'))
    R = weight(module, 'residue')[:, 0] + 1j * weight(module, 'residue')[:, 1]
    energy = np.sum(np.sum(R * poles**long, 2).real ** 2, 0).mean()  # of one filter: about 1, by S waves of 1 / S
    assert 0.6 < energy < 1.7, energy


@pytest.mark.parametrize('max_len', [10, 100])
def test_states_have_the_bytes_that_are_counted(max_len):
    """Of N - 1 filters a cache as far as filters reach, and the filters; of the modal form a constant."""
    model = model_config({'pattern': ('hyena',), 'hyena.order': 3})
    reach = min(max_len, 24)
    assert accounting.state_bytes(model, max_len) == 4 * DIM * (4 * 2 + 2 * (reach - 1) + 2 * reach) * model.num_blocks
    model = model_config({'pattern': ('hyena_modal',), 'hyena_modal.order': 3})
    assert accounting.state_bytes(model, max_len) == 4 * DIM * (4 * 2 + 2 * 2 * 2) * model.num_blocks
