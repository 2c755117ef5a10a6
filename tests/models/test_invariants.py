"""The invariants of every layer: causality, one result in every mode, documents kept apart, finite gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.models import decoder
from mixcon_jax.models.context import Context
from tests.models.cases import DIM, but_slow, layer, model_config, of_every_kind, packed_context, runner

# Pieces are of one token or of nine, and rows two: a layer is compiled for few shapes.
T, PIECE = 19, 9
ROOM = T + PIECE // 2  # of a state, as rows may be padded
TOLERANCE = {'rtol': 2e-5, 'atol': 2e-5}
NAMES = but_slow()


def tokens(seed, batch=2, length=T):
    return jax.random.normal(jax.random.key(seed), (batch, length, DIM))


def whole(name, x):
    return runner(name)(x, Context.whole(*x.shape[:2]), None)[0]


def in_pieces(name, x, sizes):
    """Feeds x in pieces of the given sizes, handing the state on."""
    state = layer(name).init_state(x.shape[0], ROOM)
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


# From pieces to tokens and back, and tokens alone; what remains is other sizes.
OTHERS = [9, 10], [1, 18], [10, 1, 8]
SPLITS = [[1] * T, [PIECE, 1, PIECE], *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in OTHERS)]


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('sizes', SPLITS, ids=str)
def test_any_split_of_prefill_and_decode_equals_the_whole(name, sizes):
    x = tokens(2)
    np.testing.assert_allclose(in_pieces(name, x, sizes), whole(name, x), **TOLERANCE)


@pytest.mark.parametrize('name', NAMES)
def test_packed_documents_equal_separate_ones(name):
    """Outputs and the gradients of inputs and parameters; padding follows the last document."""
    lengths = [5, 1, 9]
    starts = np.cumsum([0, *lengths])
    x, cotangent = tokens(3, batch=1), tokens(4, batch=1)
    rows = lambda values: jnp.concatenate([pad(values[:, a:b]) for a, b in itertools.pairwise(starts)])
    pad = lambda values: jnp.pad(values, ((0, 0), (0, T - values.shape[1]), (0, 0)))
    graphdef, params, rest = nnx.split(layer(name), nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def graded(params, x, cotangent, context):
        y, _, _ = nnx.merge(graphdef, params, rest)(x, context, None)
        y = jnp.where(context.mask[..., None], y, 0)
        return jnp.vdot(y, cotangent), y

    # One program for both: in its first row all documents, or in each row one.
    empty = packed_context([], T)
    together = [packed_context(lengths, T), empty, empty]
    apart = [packed_context([n], T) for n in lengths]
    join = lambda contexts: jax.tree.map(lambda *parts: jnp.concatenate(parts), *contexts)
    first = lambda values: jnp.zeros((3, *values.shape[1:])).at[:1].set(values)
    (grads, dx), y = graded(params, first(x), first(cotangent), join(together))
    (expected_grads, expected_dx), expected = graded(params, rows(x), rows(cotangent), join(apart))
    np.testing.assert_allclose(rows(y[:1]), expected, **TOLERANCE)
    pairs = zip(jax.tree.leaves((grads, rows(dx[:1]))), jax.tree.leaves((expected_grads, expected_dx)), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * float(jnp.abs(want).max() + 1))


@pytest.mark.parametrize('name', NAMES)
def test_padding_on_either_side_leaves_outputs_and_states_alone(name):
    """A row padded on the left, or on the right, then continued, gives what it gives alone."""
    x = tokens(5)
    expected = whole(name, x)
    filler = jax.random.normal(jax.random.key(6), (2, ROOM - T, DIM))
    some = PIECE - (ROOM - T)

    def padded(pad_left):
        positions = jnp.broadcast_to(jnp.arange(some), (2, some))
        ones, zeros = jnp.ones_like(positions), jnp.zeros(filler.shape[:2], jnp.int32)
        parts = (zeros, ones) if pad_left else (ones, zeros)
        places = (zeros - 1, positions) if pad_left else (positions, zeros)
        values = (filler, x[:, :some]) if pad_left else (x[:, :some], filler)
        context = Context(jnp.concatenate(parts, 1), jnp.concatenate(places, 1))
        state = layer(name).init_state(2, ROOM)
        y, state, _ = runner(name)(jnp.concatenate(values, 1), context, state)
        outputs, start = [y[:, -some:] if pad_left else y[:, :some]], some
        while start < T:
            size = PIECE if start + PIECE <= T else 1
            y, state, _ = runner(name)(x[:, start : start + size], Context.whole(2, size, start), state)
            outputs.append(y)
            start += size
        return jnp.concatenate(outputs, axis=1)

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


# Three of those with most attributes; a list would show in generating, too.
@pytest.mark.parametrize(
    'name',
    [
        name if name in ('conba', 'rwkv7', 'moe') else pytest.param(name, marks=pytest.mark.slow)
        for name in of_every_kind()
    ],
)
def test_a_models_structure_may_be_a_static_argument_and_needs_no_values(name):
    """As `mixcon generate` has it: a list among a layer's attributes could not be hashed."""
    config = model_config(of_every_kind()[name][1])
    graphdef, variables = nnx.split(decoder.abstract(config))
    assert isinstance(hash(graphdef), int)
    made_with_values = nnx.split(nnx.eval_shape(lambda: decoder.create(config)))
    assert graphdef == made_with_values[0]
    like = lambda state: [
        (path, leaf.shape, leaf.dtype, leaf.get_metadata()) for path, leaf in nnx.to_flat_state(state)
    ]
    assert like(variables) == like(made_with_values[1])


# conba_paper's scans are conba's, attention with positions is attention, experts are moe's, and those of a mixer on
# Mamba's scan.
LONG = but_slow(
    'rwkv_channel_mix', 'attention_window', 'hyena_modal', 'moe_grouped', 'moe_mamba', 'attention_rope', 'conba_paper',
    'rwkv7', 'large_kernel',
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
