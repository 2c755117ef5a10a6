"""The embedding's gradient by sorted tokens, against sums in float64 and XLA's scatter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mixcon_jax import config as configs
from mixcon_jax.models.embedding import lookup, sums_by_token
from mixcon_jax.parallel import layout
from mixcon_jax.parallel.axes import RULES
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.parallel.rules import on_mesh
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
        return jax.vjp(lambda table: lookup(table, tokens, jnp.dtype(dtype), gradient), table)

    (y, sorted_vjp), (want, scatter_vjp) = both('sorted'), both('scatter')
    np.testing.assert_array_equal(y, want)
    np.testing.assert_allclose(sorted_vjp(dy)[0], scatter_vjp(dy)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'mesh',
    [{'data': 2, 'context': 2, 'tensor': 2}, {'fsdp': 4, 'context': 2}, {'fsdp': 2, 'expert': 2, 'tensor': 2}],
    ids=str,
)
def test_each_device_adds_up_its_own_tokens(mesh):
    """On a mesh: the same sums, though no device sorts more than its own tokens; parts of the table lie on several."""
    config = configs.default().mesh
    config.update({'data': 1} | mesh)
    made = make_mesh(config, jax.devices())
    vocab, width, rows, length = 40, 12, 8, 6
    table = jnp.asarray(np.random.default_rng(4).normal(size=(vocab, width)), jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, vocab, (rows, length)), jnp.int32)
    dy = jnp.asarray(np.random.default_rng(6).normal(size=(rows, length, width)), jnp.bfloat16)
    parts = NamedSharding(made, layout.partition_spec(('vocab', 'embed'), table.shape, made, RULES))

    def both(table, tokens, dy):
        y, pull = jax.vjp(lambda table: lookup(table, tokens, dy.dtype, 'sorted'), table)
        return y, pull(dy)[0]

    with on_mesh(made, RULES):
        placed = jax.device_put((table, tokens, dy), (parts, *[layout.replicated(made)] * 2))
        compiled = jax.jit(both).lower(*placed).compile()
        y, d_table = compiled(*placed)
    want = np.zeros((vocab, width))
    np.add.at(want, np.asarray(tokens).reshape(-1), np.asarray(dy, np.float64).reshape(-1, width))
    np.testing.assert_array_equal(y, table[tokens].astype(dy.dtype))
    np.testing.assert_allclose(d_table, want, rtol=1e-5, atol=1e-6)
    assert d_table.dtype == jnp.float32 and d_table.sharding.is_equivalent_to(parts, 2)
    own = rows * length * mesh.get('tensor', 1) // made.size
    sorted_ = re.findall(r'= \(?s32\[(\d+)\].* sort\(', compiled.as_text())
    assert set(sorted_) == {str(own)}


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
