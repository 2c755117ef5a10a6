"""The large kernel against a loop over tokens and branches in float64; merged it is the same function."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.checks import ConfigError
from mixcon_jax.models.accounting import parameter_count, state_bytes
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters
from mixcon_jax.models.mixers.large_kernel import LargeKernel, folded
from tests.models.cases import DIM, model_config, packed_context, perturbed

T, LENGTHS = 40, [22, 1, 13]


def build(**options):
    config = model_config({'pattern': ('large_kernel',)} | {f'large_kernel.{k}': v for k, v in options.items()})
    return perturbed(LargeKernel(config, Parameters(jax.random.key(0)), 4), 1)


def document(module, x):
    """One document [T, D], token after token and branch after branch, as the equations have it."""
    w = {name: np.asarray(v[...], np.float64) for name, v in vars(module).items() if hasattr(v, 'get_metadata')}
    options, u, y = module.options, np.zeros(x.shape), np.zeros(x.shape)
    branches = [('kernel', options.kernel, 1)]
    branches += [(f'branch_{i}', *b) for i, b in enumerate(zip(options.branch_sizes, options.dilations, strict=True))]
    for t in range(len(x)):
        u[t] = w['bias']
        for name, size, step in branches:
            for j in range(size):
                if t - j * step >= 0:
                    u[t] += w[f'{name}_scale'] * w[name][j] * x[t - j * step]
        past = np.exp(-(t - np.arange(t + 1))[:, None] * np.exp(w['log_rate']))
        mean = (past * u[: t + 1]).sum(0) / past.sum(0)
        gate = 1 / (1 + np.exp(-np.maximum(mean @ w['squeeze'], 0) @ w['excite']))
        hidden = (u[t] * gate) @ w['w_up']
        y[t] = (hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2)))) @ w['w_down']
    return y


@pytest.mark.parametrize('options', [{}, {'kernel': 31}, {'branch_sizes': (4, 2), 'dilations': (3, 12)}], ids=str)
def test_the_layer_is_a_loop_over_tokens_and_branches(options):
    module = build(**options)
    x = jax.random.normal(jax.random.key(3), (1, T, DIM))
    y, _, _ = module(x, packed_context(LENGTHS, T), None)
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        want = document(module, np.asarray(x[0, part], np.float64))
        np.testing.assert_allclose(y[0, part], want, rtol=1e-4, atol=2e-5 * np.abs(want).max())
        start += length


def merged(module, **options):
    """The merged layer of the same function."""
    single = build(merged=True, **options)
    weights = {name: v[...] for name, v in vars(module).items() if name.startswith(('kernel', 'branch'))}
    for name, variable in vars(single).items():
        if hasattr(variable, 'get_metadata'):
            variable[...] = folded(weights, module.options) if name == 'kernel' else getattr(module, name)[...]
    return single


@pytest.mark.parametrize('kernel', [13, 31])
def test_merged_is_the_same_function_and_trains(kernel):
    """Outputs and the gradient of the tokens; the one kernel's gradient is what its branches' are made of."""
    module, x = build(kernel=kernel), jax.random.normal(jax.random.key(4), (1, T, DIM))
    single, context = merged(module, kernel=kernel), packed_context(LENGTHS, T)
    assert not [name for name in vars(single) if name.startswith('branch') or name == 'kernel_scale']

    def graded(layer):
        graphdef, params = nnx.split(layer, nnx.Param)

        def loss(params, x):
            y = nnx.merge(graphdef, params)(x, context, None)[0]
            return jnp.sum(jnp.sin(y) * context.mask[..., None]), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    (grads, dx), y = graded(module)
    (single_grads, single_dx), single_y = graded(single)
    scale = float(jnp.abs(y).max())
    assert np.abs(y - single_y).max() <= 1e-5 * scale
    np.testing.assert_allclose(dx, single_dx, rtol=1e-4, atol=1e-5 * np.abs(dx).max())
    first = grads['branch_1'][...]
    step = module.options.dilations[1]
    want = single_grads['kernel'][...][: (len(first) - 1) * step + 1 : step] * module.branch_1_scale[...]
    np.testing.assert_allclose(first, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_published_branches_and_those_of_longer_kernels():
    options = model_config({'pattern': ('large_kernel',)}).large_kernel
    assert (options.branch_sizes, options.dilations) == ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5))
    options = model_config({'pattern': ('large_kernel',), 'large_kernel.kernel': 127}).large_kernel
    assert (options.branch_sizes, options.dilations) == ((5, 9, 3, 3, 3), (1, 15, 31, 39, 55))
    for kernel in (*range(1, 20), 61, 128, 300):
        options = model_config({'pattern': ('large_kernel',), 'large_kernel.kernel': kernel}).large_kernel
        reach = [(size - 1) * step for size, step in zip(options.branch_sizes, options.dilations, strict=True)]
        assert all(lag < kernel for lag in reach) and bool(reach) == (kernel >= 5)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'branch_sizes': (3, 3), 'dilations': (1,)}, 'are of different lengths; give every branch both'),
        ({'branch_sizes': (5,), 'dilations': (4,)}, r'model\.large_kernel\.kernel=13 has no lag 16'),
        ({'branch_sizes': (0,), 'dilations': (1,)}, 'must be sizes of at least 1'),
    ],
)
def test_branches_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_its_state_is_the_kernels_length_and_it_is_counted():
    """K - 1 tokens, and three numbers a channel of the mean, however long the text is."""
    model = model_config({'pattern': ('large_kernel',), 'large_kernel.kernel': 31})
    assert state_bytes(model, 10_000) == 4 * DIM * (30 + 3)
    config = model_config({'pattern': ('large_kernel',), 'large_kernel.kernel': 31, 'large_kernel.merged': True})
    branches = sum(size + 1 for size in model.large_kernel.branch_sizes) + 1
    assert parameter_count(model).total - parameter_count(config).total == branches * DIM


def test_decoding_reads_no_further_back_than_the_document():
    module = build(kernel=13)
    x = jax.random.normal(jax.random.key(5), (1, 9, DIM))
    state = module.init_state(1, 9)
    _, state, _ = module(x, Context.whole(1, 9), state)
    fresh, _, _ = module(x[:, :1], Context.whole(1, 1), module.init_state(1, 9))
    after, _, _ = module(x[:, :1], Context.whole(1, 1), state)  # another document begins
    np.testing.assert_allclose(after, fresh, rtol=1e-6, atol=1e-6)
