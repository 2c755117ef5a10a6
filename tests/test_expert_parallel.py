"""Experts that several devices share, against each (token, choice) pair by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from mixcon_jax.parallel import expert_parallel

TOKENS, CHOICES, DIM = 6, 2, 3  # of each device


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What JAX's documentation says of it, by gathering everything: XLA:CPU has none."""
    sources = lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    me = lax.axis_index(axis_name)
    for operand, begin, size, end in zip(*sources):
        index = jnp.arange(len(output)) - end[me]
        value = operand.at[begin[me] + index].get(mode='fill', fill_value=-1)
        within = ((index >= 0) & (index < size[me])).reshape(-1, *[1] * (output.ndim - 1))
        output = jnp.where(within, value, output)
    return output


@pytest.fixture(autouse=True)
def _ragged(monkeypatch):
    monkeypatch.setattr(lax, 'ragged_all_to_all', ragged_all_to_all)


def draw(routing, devices, experts, seed=0):
    """Tokens of all devices, the experts that they chose (a fifth none), weights, a matrix for each expert."""
    rng = np.random.default_rng(seed)
    tokens = devices * TOKENS
    chances = {'random': np.ones(experts), 'skewed': 0.5 ** np.arange(experts), 'one': np.eye(experts)[0] + 1e-9}
    scores = np.log(chances[routing]) + rng.gumbel(size=(tokens, experts))
    owner = np.argsort(-scores, axis=1)[:, :CHOICES]
    owner[rng.random(tokens) < 0.2] = experts
    x, weights = rng.standard_normal((tokens, DIM)), rng.random((tokens, CHOICES))
    return x, weights, owner.astype(np.int32), rng.standard_normal((experts, DIM, DIM))


def on_devices(x, weights, owner, matrices, shape=(4,), **options):
    """``run`` with ``tanh(row @ matrix)`` for an expert; y and what was taken."""
    names = ('a', 'b')[: len(shape)]
    mesh = jax.make_mesh(
        shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape), devices=jax.devices()[: np.prod(shape)]
    )

    def local(x, weights, owner, matrices):
        def experts(rows, sizes):
            index = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side='right')
            mine = matrices.at[index].get(mode='fill', fill_value=0)
            return jnp.tanh(jnp.einsum('md,mdf->mf', rows, mine))

        count = len(matrices) * lax.axis_size(names)
        return expert_parallel.run(x, owner, weights, experts, axes=names, num_experts=count, **options)

    return jax.shard_map(local, mesh=mesh, in_specs=P(names), out_specs=P(names), check_vma=False)(
        x, weights, owner, matrices
    )


def plain(x, weights, owner, matrices, taken=True):
    chosen = matrices.at[owner].get(mode='fill', fill_value=0)
    return jnp.einsum('nkf,nk->nf', jnp.tanh(jnp.einsum('nd,nkdf->nkf', x, chosen)), jnp.where(taken, weights, 0))


@pytest.mark.parametrize('method', ['padded', 'ragged'])
@pytest.mark.parametrize('routing, shape, experts', [('random', (4,), 8), ('skewed', (2, 2), 4), ('one', (4,), 4)])
@pytest.mark.parametrize('capacity', [0.0, 1.0, 0.5])
def test_outputs_and_gradients_are_those_of_every_pair_by_itself(method, routing, shape, experts, capacity):
    """Of those pairs that were taken: all, where there is room for all that could come."""
    if method == 'ragged' and len(shape) > 1:
        shape = (4,)
    x, weights, owner, matrices = draw(routing, 4, experts)
    with jax.enable_x64(True):
        x, weights, owner, matrices = map(jnp.asarray, (x, weights, owner, matrices))
        dy = jnp.asarray(np.random.default_rng(9).standard_normal(x.shape))
        run = functools.partial(on_devices, shape=shape, capacity=capacity, method=method)

        def loss(x, weights, matrices):
            y, taken = run(x, weights, owner, matrices)
            return jnp.sum(y * dy), (y, taken)

        arguments = x, weights, matrices
        found, (y, taken) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
        want_loss = lambda x, weights, matrices: jnp.sum(plain(x, weights, owner, matrices, taken) * dy)
        wanted = jax.grad(want_loss, argnums=(0, 1, 2))(*arguments)
        np.testing.assert_allclose(y, plain(x, weights, owner, matrices, taken), rtol=1e-10, atol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, wanted)
    real, taken = np.asarray(owner) < experts, np.asarray(taken)
    assert not taken[~real].any()
    np.testing.assert_array_equal(taken, expected(np.asarray(owner), experts, capacity, method))
    if not capacity:
        assert taken[real].all()


def expected(owner, experts, capacity, method, devices=4):
    """Which pairs find room, counted one by one: a device's earlier tokens first."""
    local = experts // devices
    most = TOKENS * min(CHOICES, local)
    taken = np.zeros(owner.shape, bool)
    used = np.zeros((devices, devices), int)
    for token, choice in np.ndindex(*owner.shape):
        source, target = token // TOKENS, owner[token, choice] // local
        if target == devices:
            continue
        if method == 'padded':
            room = min(most, -int(-capacity * TOKENS * CHOICES / devices // 1)) if capacity else most
            taken[token, choice] = used[source, target] < room
        else:
            room = min(devices * most, -int(-capacity * TOKENS * CHOICES // 1)) if capacity else devices * most
            taken[token, choice] = used[:, target].sum() < room
        used[source, target] += 1
    return taken


def test_what_is_dropped_depends_on_no_later_token():
    x, weights, owner, matrices = draw('skewed', 4, 4, seed=3)
    run = jax.jit(lambda owner: on_devices(x, weights, owner, matrices, capacity=0.5)[1])
    taken = np.asarray(run(owner))
    changed = np.where(np.arange(len(owner))[:, None] % TOKENS > 3, (owner + 1) % 4, owner)
    again = np.asarray(run(changed))
    before = np.arange(len(owner)) % TOKENS <= 3
    assert not taken.all() and (again != taken).any()
    np.testing.assert_array_equal(again[before], taken[before])
