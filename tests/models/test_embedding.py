"""The embedding's gradient by sorted tokens, against sums in float64 and XLA's scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcon_jax.models.embedding import lookup, sums_by_token
from mixcon_jax.step import make_steps
from mixcon_jax.trees import named_leaves
from tests.training import mesh_of, random_batch, step_config

VOCAB, WIDTH = 37, 5
DRAW = np.random.default_rng(0)
TOKENS = {
    'random': DRAW.integers(0, VOCAB, 200),
    'none': np.zeros(0, int),
    'one': np.array([VOCAB - 1]),
    'all equal': np.full(300, 11),
    'all different': np.arange(VOCAB),
    'descending': np.repeat(np.arange(VOCAB)[::-1], 3),
    'the first and the last': np.array([0, VOCAB - 1, 0, VOCAB - 1, 0]),
    'no power of two': DRAW.integers(0, 3, 129),
}


@pytest.mark.parametrize('name', TOKENS)
def test_sums_by_token_against_float64(name):
    tokens = TOKENS[name]
    rows = np.random.default_rng(1).normal(size=(len(tokens), WIDTH)).astype(np.float32)
    run = jax.jit(sums_by_token, static_argnums=2)
    got = run(jnp.asarray(rows), jnp.asarray(tokens, jnp.int32), VOCAB)
    want = np.zeros((VOCAB, WIDTH))
    np.add.at(want, tokens, rows.astype(np.float64))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not np.any(np.asarray(got)[np.setdiff1d(np.arange(VOCAB), tokens)])
    np.testing.assert_array_equal(got, run(jnp.asarray(rows), jnp.asarray(tokens, jnp.int32), VOCAB))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_sorted_gradient_equals_the_scatter(dtype):
    table = jnp.asarray(np.random.default_rng(2).normal(size=(VOCAB, WIDTH)), jnp.float32)
    tokens = jnp.asarray(TOKENS['random'].reshape(4, 50), jnp.int32)
    dy = jnp.asarray(np.random.default_rng(3).normal(size=(4, 50, WIDTH)), dtype)

    def both(gradient):
        return jax.vjp(lambda table: lookup(table, tokens, gradient).astype(dtype), table)

    (y, sorted_vjp), (want, scatter_vjp) = both('sorted'), both('scatter')
    np.testing.assert_array_equal(y, want)
    np.testing.assert_allclose(sorted_vjp(dy)[0], scatter_vjp(dy)[0], rtol=1e-5, atol=1e-5)


def test_its_program_scatters_nothing():
    rows, tokens = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    text = jax.jit(sums_by_token, static_argnums=2).lower(rows, tokens, VOCAB).as_text()
    assert 'scatter' not in text and 'stablehlo.sort' in text


@pytest.mark.parametrize('accum', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_is_the_same_by_either_gradient(accum):
    options = {'model__pattern': ('attention+mlp',), 'train__accum_steps': accum, 'optim__eps': 1.0}

    def stepped(gradient):
        config = step_config(model__embedding_gradient=gradient, **options)
        steps = make_steps(config, mesh_of(config, 1))
        batch = steps.put(random_batch(1, config.train.batch_size, 13))
        return [named_leaves(steps.train_step(steps.init_state(), batch)[0].params) for _ in range(2)]

    (got, again), (want, _) = stepped('sorted'), stepped('scatter')
    for name in want:
        np.testing.assert_array_equal(got[name], again[name], err_msg=name)
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-6, err_msg=name)
