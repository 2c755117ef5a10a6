"""Into the order of experts and back, against what XLA differentiates by itself, and without its scatters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcon_jax.parallel.experts import combine, dispatch, order

CASES = [(7, 2, 3, 5), (1, 1, 1, 1), (13, 3, 4, 8), (0, 2, 3, 4), (6, 4, 4, 3)]  # tokens, choices, experts, features


def draw(tokens: int, choices: int, experts: int, features: int, seed: int = 0):
    """Features, weights, who owns each pair (some nobody), and matrices in place of the experts."""
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((tokens, features)), rng.random((tokens, choices))
    owner = np.argsort(rng.random((tokens, experts)), axis=1)[:, :choices]
    owner[rng.random(tokens) < 0.2] = experts
    return x, weights, owner, rng.standard_normal((experts + 1, features, features))


def sorted_way(x, weights, owner, matrices):
    found = order(owner, len(matrices) - 1)
    experts = owner.reshape(-1)[found.pairs]
    rows = jnp.einsum('md,mdf->mf', dispatch(x, found), matrices[experts])
    return combine(jnp.tanh(rows), weights, found)


def plain_way(x, weights, owner, matrices):
    rows = jnp.tanh(jnp.einsum('nd,nkdf->nkf', x, matrices[owner]))
    return jnp.einsum('nkf,nk->nf', rows, weights)


@pytest.mark.parametrize('case', CASES, ids=str)
@pytest.mark.parametrize('seed', range(2))
def test_outputs_and_gradients_are_those_of_every_pair_by_itself(case, seed):
    x, weights, owner, matrices = draw(*case, seed)
    dy = np.random.default_rng(9).standard_normal(x.shape)
    with jax.enable_x64(True):
        loss = lambda way: lambda x, weights: jnp.sum(way(x, weights, jnp.asarray(owner), jnp.asarray(matrices)) * dy)
        arguments = jnp.asarray(x), jnp.asarray(weights)
        found = jax.value_and_grad(loss(sorted_way), argnums=(0, 1))(*arguments)
        wanted = jax.value_and_grad(loss(plain_way), argnums=(0, 1))(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, wanted)


def test_rows_are_sorted_by_expert_then_token_and_those_of_none_come_last():
    found = order(jnp.array([[2, 0], [3, 3], [0, 1], [2, 1]]), 3)  # 3 is none
    assert found.pairs.tolist() == [1, 4, 5, 7, 0, 6, 2, 3]
    assert found.group_sizes.tolist() == [2, 2, 2]
    np.testing.assert_array_equal(found.pairs[found.rows], np.arange(8).reshape(4, 2))


def test_no_sum_is_left_to_a_scatter_and_bfloat16_is_added_in_float32():
    x, weights, owner, _ = draw(13, 3, 4, 8)

    def loss(x, weights, owner):
        found = order(owner, 4)
        return jnp.sum(combine(jnp.tanh(dispatch(x, found)), weights, found).astype(jnp.float32) ** 2)

    arguments = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weights, jnp.float32), jnp.asarray(owner)
    assert 'scatter' not in str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*arguments))
    # The same rows for every choice: in bfloat16, 256 + 1 + 1 would stay 256.
    ones = order(jnp.zeros((1, 3), jnp.int32), 1)
    rows = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
    assert combine(rows, jnp.ones((1, 3)), ones).tolist() == [[258.0]]
    _, pull = jax.vjp(lambda x: dispatch(x, ones), jnp.ones((1, 1), jnp.bfloat16))
    assert pull(rows)[0].tolist() == [[258.0]]
