"""The invariants of every layer: causality, one result in every mode, documents kept apart, finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.models import decoder
from mixcon_jax.models.context import Context
from tests.models.cases import CASES, DIM, layer, model_config, of_every_kind, packed_context, runner

T = 18
NAMES = list(CASES)
TOLERANCE = {'rtol': 2e-5, 'atol': 2e-5}


def but_slow(*slow):
    """All cases, those named here left to `make test-all`."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in NAMES]


def tokens(seed, batch=2, length=T):
    return jax.random.normal(jax.random.key(seed), (batch, length, DIM))


def whole(name, x):
    return runner(name)(x, Context.whole(*x.shape[:2]), None)[0]


def in_pieces(name, x, sizes):
    """Feeds x in pieces of the given sizes, handing the state on."""
    state = layer(name).init_state(x.shape[0], x.shape[1])
    pieces, start = [], 0
    for size in sizes:
        context = Context.whole(x.shape[0], size, start)
        y, state, _ = runner(name)(x[:, start : start + size], context, state)
        pieces.append(y)
        start += size
    assert start == x.shape[1]
    return jnp.concatenate(pieces, axis=1)


@pytest.mark.parametrize('name', NAMES)
def test_causality(name):
    """Outputs before t do not change when the tokens from t on do; the output at t does."""
    x = tokens(0)
    for t in (1, 9, T - 1):
        changed = x.at[:, t:].set(tokens(1)[:, t:])
        before, after = whole(name, x), whole(name, changed)
        np.testing.assert_allclose(before[:, :t], after[:, :t], rtol=1e-6, atol=1e-6)
        assert jnp.abs(before[:, t] - after[:, t]).max() > 1e-3


SPLITS = [[1] * T, [9, 9], pytest.param([1, 17], marks=pytest.mark.slow), [9, 1, 8]]


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('sizes', SPLITS, ids=str)
def test_any_split_of_prefill_and_decode_equals_the_whole(name, sizes):
    x = tokens(2)
    np.testing.assert_allclose(in_pieces(name, x, sizes), whole(name, x), **TOLERANCE)


# Parts of others.
@pytest.mark.parametrize('name', but_slow('conba_code', 'conba_diag', 'conba_companion', 'moe_mamba_all'))
def test_packed_documents_equal_separate_ones(name):
    """Outputs and the gradients of inputs and parameters; padding follows the last document."""
    lengths = [5, 1, 9]
    x, cotangent = tokens(3, batch=1), tokens(4, batch=1)
    graphdef, variables = nnx.split(layer(name), nnx.Param, ...)[0], nnx.split(layer(name), nnx.Param, ...)[1:]

    @jax.jit
    def packed(params, x):
        y, _, _ = nnx.merge(graphdef, params, variables[1])(x, packed_context(lengths, T), None)
        return jnp.vdot(y[:, : sum(lengths)], cotangent[:, : sum(lengths)]), y

    @jax.jit
    def separate(params, x):
        total, outputs, start = 0.0, [], 0
        for n in lengths:
            y, _, _ = nnx.merge(graphdef, params, variables[1])(x[:, start : start + n], Context.whole(1, n), None)
            total += jnp.vdot(y, cotangent[:, start : start + n])
            outputs.append(y)
            start += n
        return total, jnp.concatenate(outputs, axis=1)

    grads, y = jax.grad(packed, argnums=(0, 1), has_aux=True)(variables[0], x)
    expected_grads, expected = jax.grad(separate, argnums=(0, 1), has_aux=True)(variables[0], x)
    np.testing.assert_allclose(y[:, : sum(lengths)], expected, **TOLERANCE)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * float(jnp.abs(want).max() + 1))


@pytest.mark.parametrize('name', NAMES)
def test_padding_on_either_side_leaves_outputs_and_states_alone(name):
    """A row padded on the left, or on the right, then continued, gives what it gives alone."""
    x = tokens(5, batch=1)
    expected = whole(name, x)
    filler = jax.random.normal(jax.random.key(6), (1, 4, DIM))

    def padded(pad_left):
        positions = jnp.arange(9)[None]
        ones, zeros = jnp.ones((1, 9), jnp.int32), jnp.zeros((1, 4), jnp.int32)
        parts = (zeros, ones) if pad_left else (ones, zeros)
        places = (zeros - 1, positions) if pad_left else (positions, zeros)
        values = (filler, x[:, :9]) if pad_left else (x[:, :9], filler)
        context = Context(jnp.concatenate(parts, 1), jnp.concatenate(places, 1))
        state = layer(name).init_state(1, T + 4)
        y, state, _ = runner(name)(jnp.concatenate(values, 1), context, state)
        rest, _, _ = runner(name)(x[:, 9:], Context.whole(1, 9, 9), state)
        return jnp.concatenate([y[:, 4:] if pad_left else y[:, :9], rest], axis=1)

    np.testing.assert_allclose(padded(True), expected, **TOLERANCE)
    np.testing.assert_allclose(padded(False), expected, **TOLERANCE)


@pytest.mark.parametrize('name', NAMES)
def test_bfloat16_leaves_states_in_the_types_they_start_with(name):
    """A sum that is carried in bfloat16 shows here: it comes back narrower than ``init_state`` made it."""
    graphdef, variables = nnx.split(layer(name, 'bfloat16'))
    state = layer(name, 'bfloat16').init_state(1, T)
    x = jax.ShapeDtypeStruct((1, T, DIM), jnp.bfloat16)
    run = lambda variables, x, state: nnx.merge(graphdef, variables)(x, Context.whole(1, T), state)[1]
    after = jax.eval_shape(run, variables, x, state)
    types = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (after, state)]
    assert types[0] == types[1]


@pytest.mark.parametrize('name', of_every_kind())
def test_a_models_structure_may_be_a_static_argument(name):
    """As `mixcon generate` has it: a list among a layer's attributes could not be hashed."""
    model = nnx.eval_shape(lambda: decoder.create(model_config(of_every_kind()[name][1])))
    assert isinstance(hash(nnx.split(model)[0]), int)


# Norms are Conba's too; feedback conba_paper's, a companion conba_companion's; retention is Mamba-2's
# primitive, RWKV-6 is on gla's.
LONG = but_slow(
    'mamba_norms', 'conba_feedback_companion', 'retnet', 'rwkv_channel_mix', 'attention_window', 'moe_mamba_all',
    'moe_switch', 'hyena_modal', 'rwkv6',
)  # fmt: skip


@pytest.mark.parametrize('name', LONG)
def test_bfloat16_gradients_are_finite_at_4096_tokens(name):
    length = 4096
    graphdef, params, rest = nnx.split(layer(name, 'bfloat16'), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(7), (1, length, DIM), jnp.bfloat16)

    @jax.jit
    @jax.grad
    def gradient(params):
        y, _, aux = nnx.merge(graphdef, params, rest)(x, Context.whole(1, length), None)
        assert y.dtype == jnp.bfloat16
        return jnp.mean(y.astype(jnp.float32) ** 2) + sum(jax.tree.leaves(aux.get('losses', {})), 0.0)

    for path, leaf in nnx.to_flat_state(gradient(params)):
        assert jnp.isfinite(leaf[...]).all(), path
        assert leaf.dtype == jnp.float32
