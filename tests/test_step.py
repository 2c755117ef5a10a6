"""The training step: one big batch however it is cut, bad steps skipped, exact evaluation, routing bias, noise."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax import step
from mixcon_jax.errors import UserError
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Buffer
from mixcon_jax.models.reported import RECORDED
from mixcon_jax.runs.fingerprint import fingerprint
from mixcon_jax.trees import named_leaves
from tests.training import mesh_of, random_batch, step_config

VOCAB, LENGTH = 61, 13


def steps_of(config, devices=1, **options):
    return step.make_steps(config, mesh_of(config, devices), **options)


def assert_same(got, want, rtol=2e-5, atol=1e-6):
    got, want = named_leaves(got), named_leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=atol, err_msg=name)


def assert_identical(got, want):
    got, want = named_leaves(got), named_leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def host(tree):
    """Copies, as a training step reuses the buffers of its state."""
    return jax.tree.map(np.array, tree)


class Plain(nnx.Module):
    """A model that compiles fast: features are the tokens' embeddings, plus what a test adds."""

    def __init__(self, config, seed):
        shape = (config.vocab_size, config.dim)
        self.embedding = nnx.Param(jax.random.normal(jax.random.key(seed), shape), logical_axes=('vocab', 'embed'))
        self.extra = nnx.Param(jnp.zeros((config.dim,)), logical_axes=('embed',))
        self.seen = Buffer(jnp.zeros((1,)), logical_axes=('layers',))

    def __call__(self, tokens, context, state=None):
        return self.embedding[...][tokens] + self.add(context), state, {'losses': {}, 'stats': {}}

    def add(self, context):
        return self.extra[...]

    def head(self):
        return self.embedding[...].T

    def update_buffers(self, buffers, stats):
        return buffers


# ----- one big batch, however it is cut -----
# Adam divides by its second moment, which blows rounding up where gradients vanish: a large epsilon keeps the
# comparison of parameters meaningful, and Adam's first moment compares the (clipped) gradients themselves.
LINEAR = {'optim__eps': 1.0, 'optim__learning_rate': 1.0}


def two_steps(config, devices):
    """Everything that two training steps on batches of unequal padding leave behind."""
    steps = steps_of(config, devices)
    state, metrics = steps.init_state(), []
    for seed in (1, 2):
        state, more = steps.train_step(state, steps.put(random_batch(seed, config.train.batch_size, LENGTH)))
        metrics.append(host(more))
    return host(state), metrics


@functools.cache
def want_two_steps(**options):
    """The oracle of several tests: one device, one microbatch."""
    return two_steps(step_config(**LINEAR, **options), 1)


# A step of every layer on such a mesh is in tests/test_meshes.py, and microbatches on four devices are below.
AXES = [
    *(pytest.param({axis: 8}, marks=pytest.mark.slow) for axis in ('data', 'fsdp')),
    pytest.param({'data': 2, 'fsdp': 2, 'tensor': 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize('axes', AXES)
def test_devices_share_a_batch_as_if_it_were_one(axes):
    """Auxiliary losses included: their statistics are over the whole mesh."""
    options = {'model__moe__router_z_coef': 0.01, 'train__z_loss_coef': 0.001}
    want_state, want_metrics = want_two_steps(**options)
    mesh = {f'mesh__{axis}': size for axis, size in axes.items()}
    state, metrics = two_steps(step_config(**LINEAR, **options, **mesh), 8)
    assert_same(metrics, want_metrics)
    assert_same(state, want_state)


@pytest.mark.parametrize('accum, devices', [*(pytest.param(n, 1, marks=pytest.mark.slow) for n in (2, 8)), (2, 4)])
def test_accumulation_is_one_big_batch(accum, devices):
    """Balance coefficients are 0: that loss is a mean over microbatches, each with its own statistics."""
    options = {'model__moe__balance': 'none', 'train__z_loss_coef': 0.001}
    want_state, want_metrics = want_two_steps(**options)
    state, metrics = two_steps(step_config(**LINEAR, **options, train__accum_steps=accum), devices)
    assert_same(state, want_state)
    for got, want in zip(metrics, want_metrics):
        for name in ('loss', 'z_loss', 'grad_norm', 'tokens', 'learning_rate'):
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


def test_microbatches_are_strided_rows_and_auxiliary_losses_their_mean():
    config = step_config(train__accum_steps=4, model__moe__balance_coef=0.1)
    steps = steps_of(config)
    state, batch = steps.init_state(), random_batch(3, 8, LENGTH)
    model = steps.model(state)
    balance, load = [], []
    for i in range(4):
        part = {key: jnp.asarray(value[i::4]) for key, value in batch.items()}
        aux = model(part['tokens'], Context(part['segment_ids'], part['positions'], train=True))[2]
        balance.append(aux['losses']['balance'].value)
        load.append(aux['stats']['layer_0/moe_load'])
    metrics = steps.train_step(state, steps.put(batch))[1]
    assert metrics.keys() - RECORDED == {'balance', 'router_z'}  # no other name is free for a layer's loss
    np.testing.assert_allclose(metrics['balance'], np.mean(balance), rtol=1e-5)
    np.testing.assert_allclose(metrics['stats']['layer_0/moe_load'], np.mean(load, axis=0), rtol=1e-5)


def test_gradient_of_the_loss_is_that_of_its_formula():
    """Through the state's first moment, (1 - b1) g without clipping: dense loss, mean over tokens, weighted parts."""
    config = step_config(
        optim__clip_norm=0.0, model__moe__balance_coef=0.3, model__moe__router_z_coef=0.2, train__z_loss_coef=0.05
    )
    steps = steps_of(config)
    state, batch = steps.init_state(), random_batch(4, 8, LENGTH)
    arrays = jax.tree.map(jnp.asarray, batch)

    def loss(params):
        model = steps.model(dataclasses.replace(state, params=params))
        hidden, _, aux = model(arrays['tokens'], Context(arrays['segment_ids'], arrays['positions'], train=True))
        logits = hidden @ model.head()
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), arrays['targets'][..., None], axis=-1)[..., 0]
        z = jax.nn.logsumexp(logits, axis=-1) ** 2
        mean = lambda x: jnp.where(arrays['loss_mask'], x, 0).sum() / arrays['loss_mask'].sum()
        balance, router_z = (aux['losses'][name].value for name in ('balance', 'router_z'))
        return mean(nll) + 0.05 * mean(z) + 0.3 * balance + 0.2 * router_z, mean(nll)

    (_, nll), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
    new, metrics = steps.train_step(state, steps.put(batch))
    np.testing.assert_allclose(metrics['loss'], nll, rtol=1e-5)
    np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
    moment = next(part.mu for part in new.opt_state if hasattr(part, 'mu'))
    assert_same(jax.tree.map(lambda m: m / 0.1, moment), grads)


def test_clipping_scales_the_gradient_to_the_norm_and_reports_the_norm_before():
    free, tight = step_config(optim__clip_norm=0.0), step_config(optim__clip_norm=0.01)
    outcome = []
    for config in (free, tight):
        steps = steps_of(config, create=Plain)
        state, metrics = steps.train_step(steps.init_state(), steps.put(random_batch(5, 8, LENGTH)))
        outcome.append((next(part.mu for part in state.opt_state if hasattr(part, 'mu')), metrics['grad_norm']))
    (grads, norm), (clipped, same_norm) = outcome
    np.testing.assert_allclose(norm, same_norm, rtol=1e-6)
    assert norm > 0.01
    assert_same(clipped, jax.tree.map(lambda g: g * 0.01 / norm, grads), atol=1e-9)


def test_no_buffer_of_a_step_holds_all_logits():
    batch, length, vocab = 8, 96, 1024
    config = step_config(model__vocab_size=vocab, data__seq_len=length, train__loss_chunk=32)
    steps = steps_of(config, create=Plain)
    arrays = steps.put(random_batch(13, batch, length, vocab))
    compiled = steps.train_step.lower(steps.abstract_state, arrays).compile()
    shapes = re.findall(r'(?:pred|[a-z]+[0-9]+)\[([0-9,]+)\]', compiled.as_text())
    largest = max(math.prod(int(size) for size in shape.split(',')) for shape in shapes)
    assert 32 * vocab <= largest < batch * length * vocab / 8


def test_bfloat16_computes_while_parameters_and_states_stay_float32():
    losses = []
    for dtype in ('float32', 'bfloat16'):
        steps = steps_of(step_config(model__dtype=dtype, model__pattern=('attention+mlp',)))
        state, metrics = steps.train_step(steps.init_state(), steps.put(random_batch(14, 8, LENGTH)))
        losses.append([float(metrics['loss']), float(metrics['grad_norm'])])
        assert metrics['loss'].dtype == jnp.float32
        for name, leaf in named_leaves((state.params, state.opt_state)).items():
            assert leaf.dtype in (jnp.float32, jnp.int32), name
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)
    assert losses[1] != losses[0]


# ----- initial state -----
def test_initial_state_is_the_same_on_every_mesh_bit_for_bit():
    prints = {
        fingerprint(steps_of(step_config(mesh__fsdp=fsdp, mesh__tensor=tensor), devices).init_state().params)
        for devices, fsdp, tensor in [(1, 1, 1), (8, 1, 1), (8, 8, 1), (8, 2, 4)]
    }
    assert len(prints) == 1
    assert fingerprint(steps_of(step_config(seed=1)).init_state().params) not in prints


def test_abstract_state_tells_shapes_types_and_places():
    steps = steps_of(step_config(mesh__fsdp=8), 8)
    for name, leaf in named_leaves(steps.init_state()).items():
        want = named_leaves(steps.abstract_state)[name]
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (want.shape, want.dtype, want.sharding), name


# ----- noise -----
class Noisy(Plain):
    """Adds noise in training."""

    def add(self, context):
        shape = (*context.positions.shape, self.extra.shape[0])
        return jax.random.normal(context.rng, shape) if context.train else jnp.zeros(shape)


def test_noise_follows_seed_step_and_microbatch_and_stays_out_of_evaluation():
    def losses(**options):
        steps = steps_of(step_config(optim__learning_rate=1e-30, **options), create=Noisy)
        rows = {key: np.repeat(value[:1], 8, axis=0) for key, value in random_batch(9, 8, LENGTH).items()}
        batch, state = steps.put(rows), steps.init_state()
        evaluations, values = [], []
        for _ in range(2):
            evaluations.append(float(steps.eval_step(state, batch)['nll']))
            state, metrics = steps.train_step(state, batch)
            values.append(float(metrics['loss']))
        assert evaluations[0] == evaluations[1]
        return values

    first = losses()
    assert first == losses()  # a function of seed and step
    assert len({*first, *losses(train__seed_noise=1), *losses(train__accum_steps=2)}) == 6
    # Of equal rows each microbatch has its own noise; if they shared it, half the rows' mean would be the whole's.


# ----- routing bias -----
def test_routing_bias_moves_towards_experts_below_their_share():
    config = step_config(model__moe__balance='bias', model__moe__bias_rate=0.25, train__accum_steps=2)
    steps = steps_of(config)
    state, total = steps.init_state(), 0.0
    for seed in range(3):
        state, metrics = steps.train_step(state, steps.put(random_batch(seed, 8, LENGTH)))
        load = np.asarray(metrics['stats']['layer_0/moe_load'])
        np.testing.assert_allclose(load.sum(axis=-1), 1.0, rtol=1e-5)
        total += 0.25 * np.sign(1 / 3 - load)
        assert set(named_leaves(state.buffers)) == {'blocks/layers/0/ffn/router_bias'}
        np.testing.assert_allclose(named_leaves(state.buffers)['blocks/layers/0/ffn/router_bias'], total, rtol=1e-6)
    assert total.shape == (2, 3) and np.any(total != 0)


@pytest.mark.slow  # the bias itself is tested below
def test_named_experts_move_a_bias_of_their_own():
    layers = {'big': {'kind': 'moe', 'balance': 'bias', 'bias_rate': 0.5, 'num_experts': 5}}
    config = step_config(model__layers=layers, model__pattern=('attention+moe', 'attention+big'))
    steps = steps_of(configs.validate(config))
    state, metrics = steps.train_step(steps.init_state(), steps.put(random_batch(0, 8, LENGTH)))
    load = np.asarray(metrics['stats']['layer_1/moe_load'])
    assert load.shape == (2, 5) and metrics['stats']['layer_0/moe_load'].shape == (2, 3)
    assert set(named_leaves(state.buffers)) == {'blocks/layers/1/ffn/router_bias'}
    bias = named_leaves(state.buffers)['blocks/layers/1/ffn/router_bias']
    np.testing.assert_allclose(bias, 0.5 * np.sign(1 / 5 - load), rtol=1e-6)


# ----- evaluation -----
@pytest.mark.parametrize('devices', [pytest.param(1, marks=pytest.mark.slow), 8])
def test_evaluation_sums_each_scored_token_once(devices):
    config = step_config(train__batch_size=16, train__loss_chunk=7)
    steps = steps_of(config, devices)
    state, batch = steps.init_state(), random_batch(10, 16, LENGTH)
    batch['loss_mask'] &= np.random.default_rng(0).random(batch['loss_mask'].shape) < 0.8
    model = steps.model(state)
    arrays = jax.tree.map(jnp.asarray, batch)
    hidden = model(arrays['tokens'], Context(arrays['segment_ids'], arrays['positions']))[0]
    logits = np.asarray(hidden, np.float64) @ np.asarray(model.head(), np.float64)
    nll = np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
    sums = steps.eval_step(state, steps.put(batch))
    np.testing.assert_allclose(sums['nll'], nll[batch['loss_mask']].sum(), rtol=1e-6)
    assert sums['tokens'] == batch['loss_mask'].sum()


def test_evaluation_takes_batches_of_any_size_and_rows_of_padding():
    steps = steps_of(step_config())
    state, batch = steps.init_state(), random_batch(11, 5, LENGTH)
    padded = {key: np.concatenate([value, np.zeros((3, LENGTH), value.dtype)]) for key, value in batch.items()}
    one, other = (steps.eval_step(state, steps.put(rows)) for rows in (batch, padded))
    assert one['tokens'] == other['tokens'] > 0
    np.testing.assert_allclose(one['nll'], other['nll'], rtol=1e-6)


# ----- learning, and starting from other weights -----
# Updates of all are compared with their formulas in tests/test_optim.py.
OPTIMIZERS = ['adamw', 'muon', *(pytest.param(name, marks=pytest.mark.slow) for name in ('lion', 'adafactor'))]


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_optimizer_learns_a_batch_by_heart(optimizer):
    rate = {'adamw': 0.02, 'muon': 0.02, 'lion': 0.005, 'adafactor': 0.1}[optimizer]
    config = step_config(
        optim__name=optimizer, optim__learning_rate=rate, train__steps=30, model__pattern=('attention+mlp',)
    )
    steps = steps_of(config)
    state, batch = steps.init_state(), steps.put(random_batch(12, 8, LENGTH))
    losses = []
    for _ in range(30):
        state, metrics = steps.train_step(state, batch)
        losses.append(float(metrics['loss']))
    assert losses[-1] < 0.7 * losses[0] and int(metrics['skipped']) == 0 and not metrics['broken']


def test_other_weights_start_a_run():
    steps = steps_of(step_config(mesh__fsdp=8), 8)
    other = host(steps_of(step_config(seed=5)).init_state())
    state = step.load_params_into(steps.init_state(), other.params)
    assert_identical(state.params, other.params)
    assert jax.tree.map(lambda x: x.sharding, state.params) == jax.tree.map(
        lambda x: x.sharding, steps.abstract_state.params
    )
    assert int(state.step) == 0


def test_weights_of_another_model_are_refused_by_name():
    state = steps_of(step_config()).init_state()
    wider = steps_of(step_config(model__moe__hidden_dim=9)).init_state().params
    with pytest.raises(UserError, match=r'blocks/layers/0/ffn/w_down has shape \(2, 3, 9, 16\).*\(2, 3, 8, 16\)'):
        step.load_params_into(state, wider)
    fewer = {key: value for key, value in state.params.items() if key != 'output'}
    with pytest.raises(UserError, match='has a parameter output that the loaded weights lack'):
        step.load_params_into(state, fewer)
    with pytest.raises(UserError, match='have a parameter extra/x that the model lacks'):
        step.load_params_into(state, state.params | {'extra': {'x': np.zeros(3)}})
