"""Schedules at their key steps; each parameter's group and decay; updates of stacks equal updates of their layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax import optim
from mixcon_jax.models import decoder
from mixcon_jax.trees import logical_axes, rates, undecayed

OPTIMIZERS = ['adamw', 'muon', 'lion', 'adafactor']


# ----- schedules -----
def fractions(steps, **options):
    config = configs.default().optim
    config.update(options)
    function = jax.jit(optim.schedule(config, steps))
    return np.array([function(jnp.int32(i)) for i in range(steps + 3)])


@pytest.mark.parametrize('schedule', ['cosine', 'wsd', 'linear', 'constant'])
def test_warm_up_rises_linearly_to_the_peak(schedule):
    got = fractions(50, schedule=schedule, warmup_steps=10)
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert got.max() == 1.0 and got.min() > 0


@pytest.mark.parametrize('schedule', ['cosine', 'wsd', 'linear'])
@pytest.mark.parametrize('final', [0.0, 0.1])
def test_the_last_step_has_the_final_rate_and_it_stays(schedule, final):
    got = fractions(37, schedule=schedule, warmup_steps=5, final_fraction=final, decay_fraction=0.3)
    np.testing.assert_allclose(got[36:], final, atol=1e-6)
    assert np.all(np.diff(got[4:37]) <= 1e-7)


def test_cosine_is_a_half_wave():
    got = fractions(110, schedule='cosine', warmup_steps=10, final_fraction=0.2)
    at = lambda progress: 0.2 + 0.8 * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose(got[9:110], at(np.arange(101) / 100), rtol=1e-5)
    np.testing.assert_allclose(got[59], 0.6, rtol=1e-5)


def test_linear_is_a_straight_line():
    got = fractions(110, schedule='linear', warmup_steps=10, final_fraction=0.5)
    np.testing.assert_allclose(got[9:110], 1 - 0.5 * np.arange(101) / 100, rtol=1e-5)


def test_wsd_is_flat_until_it_decays():
    got = fractions(100, schedule='wsd', warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)
    np.testing.assert_array_equal(got[9:80], 1.0)
    np.testing.assert_allclose(got[80:100], 1 - 0.9 * np.arange(1, 21) / 20, rtol=1e-5)


@pytest.mark.parametrize('steps, decay', [(4, 0.2), (3, 0.1), (1, 0.5)])
def test_a_decay_of_less_than_a_step_takes_a_whole_one(steps, decay):
    got = fractions(steps, schedule='wsd', warmup_steps=0, final_fraction=0.1, decay_fraction=decay)
    np.testing.assert_allclose(got[:steps], [1.0] * (steps - 1) + [0.1], rtol=1e-6)
    np.testing.assert_array_equal(fractions(steps, schedule='wsd', warmup_steps=0, decay_fraction=0.0)[:steps], 1.0)


def test_constant_stays_and_edge_lengths_stay_finite():
    np.testing.assert_array_equal(fractions(20, schedule='constant', warmup_steps=0), 1.0)
    for schedule in ('cosine', 'wsd', 'linear', 'constant'):
        for steps, warmup, decay in [(1, 0, 0.2), (5, 5, 0.0), (5, 9, 1.0)]:
            got = fractions(steps, schedule=schedule, warmup_steps=warmup, decay_fraction=decay)
            assert np.all(np.isfinite(got)) and np.all(got >= 0) and np.all(got <= 1)


# ----- groups -----
# End of a parameter's name -> (group under Muon, decayed). Every parameter of every Conba variant must be here.
EXPECTED = {
    'embedding': ('adamw', False),
    'output': ('adamw', True),
    'scale': ('adamw', False),
    'q_proj': ('muon', True),
    'k_proj': ('muon', True),
    'v_proj': ('muon', True),
    'o_proj': ('muon', True),
    'w_gate': ('muon', True),
    'w_up': ('muon', True),
    'w_down': ('muon', True),
    'router': ('adamw', True),
    'in_proj': ('muon', True),
    'out_proj': ('muon', True),
    'x_proj': ('adamw', True),
    'dt_proj': ('adamw', True),
    'dt_bias': ('adamw', False),
    'A_log': ('adamw', False),
    'D': ('adamw', False),
    'conv/weight': ('adamw', False),
    'conv/bias': ('adamw', False),
    'scale_weight': ('adamw', False),
    'scale_bias': ('adamw', False),
    'readout_weight': ('adamw', True),
    'readout_bias': ('adamw', False),
    'taps': ('adamw', False),
    'companion_logit': ('adamw', False),
    'delay_weight': ('adamw', True),
    'control/alpha_proj': ('adamw', True),
    'control/alpha_bias': ('adamw', False),
    'control/decay_proj': ('adamw', True),
    'control/decay_bias': ('adamw', False),
    'control/kappa': ('adamw', False),
    'control/gain': ('adamw', True),
    'control/reference_weight': ('adamw', False),
    'control/reference_bias': ('adamw', False),
    'control/reference_proj': ('muon', True),
    'gate_linear': ('adamw', False),
    'gate_output': ('adamw', False),
    'observation_scale': ('adamw', False),
}
VARIANTS = [
    {},
    {'delay': 'companion', 'state_scaling': 'readout', 'control': 'diag', 'reference': 'proj'},
    {'delay': 'state', 'state_scaling': 'readout', 'control': 'slow', 'observation_noise': 0.1},
]


def axes_of(variant, tie=False):
    config = configs.default().model
    config.pattern = ('conba+mlp', 'mamba+moe', 'attention|moe', 'conba')
    config.num_blocks, config.tie_embeddings, config.mamba.norms = 3, tie, True
    config.conba.update(variant)
    state = nnx.state(decoder.abstract(config), nnx.Param)
    return logical_axes(state), undecayed(state)


def ends_in(name, end):
    return f'/{name}'.endswith(f'/{end}')


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_each_parameter_has_its_group_and_decay(variant, optimizer):
    groups = optim.describe_groups(optimizer, *axes_of(variant))
    for name, (group, decayed) in groups.items():
        ends = [end for end in EXPECTED if ends_in(name, end)]
        assert len(ends) == 1, f'{name} is not in the table, or twice: {ends}'
        want, want_decayed = EXPECTED[ends[0]]
        assert (group, decayed) == (want if optimizer == 'muon' else optimizer, want_decayed), name


def test_the_table_has_no_stale_entries():
    names = {name for variant in VARIANTS for name in axes_of(variant)[0]}
    assert not {end for end in EXPECTED if not any(ends_in(name, end) for name in names)}


@pytest.mark.parametrize('groups', [1, 2])
def test_muon_takes_wide_projections_alone_however_many_groups_mamba2_has(groups):
    config = configs.default().model
    config.pattern, config.mamba2.groups = ('mamba2+rwkv_channel_mix',), groups
    state = nnx.state(decoder.abstract(config), nnx.Param)
    found = optim.describe_groups('muon', logical_axes(state), undecayed(state))
    by_end = {name.split('/')[-1]: group for name, group in found.items()}
    assert {by_end[name] for name in ('B_proj', 'C_proj', 'dt_proj')} == {('adamw', True)}
    assert {by_end[name] for name in ('in_proj', 'out_proj', 'w_key', 'w_receptance', 'w_value')} == {('muon', True)}


def test_what_makes_a_filter_neither_decays_nor_learns_as_fast_as_the_rest():
    config = configs.default().model
    config.pattern, config.hyena.filter_rate = ('hyena+mlp', 'hyena_modal'), 0.25
    state = nnx.state(decoder.abstract(config), nnx.Param)
    groups = optim.describe_groups('muon', logical_axes(state), undecayed(state))
    slow = {name for name in groups if 'filter' in name or name.endswith('frequency')}
    assert rates(state) == dict.fromkeys(slow, 0.25) and len(slow) == 8
    modes = {name for name in groups if name.rsplit('/')[-1] in ('decay', 'angle', 'residue', 'skip')}
    assert len(modes) == 5 and {groups[name] for name in slow | modes} == {('adamw', False)}
    assert {groups[name] for name in groups if name.endswith('_proj')} == {('muon', True)}


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_rate_scales_the_updates_of_its_parameter_alone(optimizer):
    rng = np.random.default_rng(13)
    axes = {'a': ('embed', 'mlp'), 'b': ('embed', 'mlp')}
    config = configs.default().optim
    config.name = optimizer
    params, grads = ({name: jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for name in axes} for _ in range(2))
    plain, scaled = (optim.make_optimizer(config, axes, (), rates) for rates in (None, {'b': 0.25}))
    states = [each.init(params) for each in (plain, scaled)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])  # a run may take up another rate
    want, got = (each.update(grads, state, params)[0] for each, state in zip((plain, scaled), states))
    np.testing.assert_array_equal(got['a'], want['a'])
    np.testing.assert_allclose(got['b'], 0.25 * want['b'], rtol=1e-6)


def test_a_tied_embedding_is_an_embedding():
    assert optim.describe_groups('muon', *axes_of({}, tie=True))['embedding'] == ('adamw', False)


def test_muon_sides_of_projections_with_a_heads_axis():
    dims = optim.muon_dimensions(('layers', 'embed', 'heads', 'head_dim'))
    assert (dims.reduction_axis, dims.output_axis) == ((1,), (2, 3))
    dims = optim.muon_dimensions(('layers', 'experts', 'heads', 'head_dim', 'embed'))
    assert (dims.reduction_axis, dims.output_axis) == ((2, 3), (4,))


# ----- updates -----
def run(optimizer, axes, params, grads, **options):
    """Three updates at the peak rate by the gradients' three slices; returns the parameters."""
    config = configs.default().optim
    config.update(name=optimizer, learning_rate=0.1, muon_learning_rate=0.3, weight_decay=0.05, **options)
    transform = optim.make_optimizer(config, axes)

    @jax.jit
    def update(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    for slices in zip(*grads.values()):
        params, state = update(params, state, dict(zip(grads, slices)))
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)
    return params


# Name -> (axes, shape). 130 >= 128 lets Adafactor factor, over rows and columns and never over layers.
STACKED = {
    'in_proj': (('layers', 'embed', 'inner'), (3, 130, 134)),
    'w_up': (('layers', 'experts', 'embed', 'mlp'), (3, 2, 9, 6)),
    'x_proj': (('layers', 'inner', 'dt_rank'), (3, 7, 5)),
    'conv': (('layers', 'conv', 'inner'), (3, 4, 6)),
    'scale': (('layers', 'norm'), (3, 8)),
}


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_an_update_of_stacked_layers_is_that_of_each_layer(optimizer):
    rng = np.random.default_rng(7)
    axes = {name: axes for name, (axes, _) in STACKED.items()}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, (_, shape) in STACKED.items()}
    # Layers of unlike sizes, so that anything shared between them shows.
    sizes = np.array([1e-3, 1.0, 30.0])
    grads = {
        name: jnp.asarray(rng.normal(size=(3, *shape)) * sizes.reshape(-1, *[1] * (len(shape) - 1)), jnp.float32)
        for name, (_, shape) in STACKED.items()
    }
    got = run(optimizer, axes, params, grads)

    # The same arrays as separate parameters: one per layer, and per expert, with no stack axis left.
    for name in STACKED:
        depth = optim.stacked_axes(axes[name])
        for index in np.ndindex(params[name].shape[:depth]):
            one = run(
                optimizer,
                {name: axes[name][depth:]},
                {name: params[name][index]},
                {name: grads[name][(slice(None), *index)]},
            )
            np.testing.assert_allclose(got[name][index], one[name], rtol=2e-5, atol=2e-5, err_msg=f'{name}{index}')


def test_adafactor_factors_no_stacked_vectors():
    """130 layers of a norm of width 130 look like a matrix to anyone who counts dimensions."""
    rng = np.random.default_rng(8)
    params = {'scale': jnp.asarray(rng.normal(size=(130, 130)), jnp.float32)}
    grads = {'scale': jnp.asarray(rng.normal(size=(3, 130, 130)), jnp.float32)}
    got = run('adafactor', {'scale': ('layers', 'norm')}, params, grads)
    for layer in (0, 17, 129):
        one = run(
            'adafactor', {'scale': ('norm',)}, {'scale': params['scale'][layer]}, {'scale': grads['scale'][:, layer]}
        )
        np.testing.assert_allclose(got['scale'][layer], one['scale'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_without_gradient_only_weight_matrices_shrink(optimizer):
    rng = np.random.default_rng(9)
    axes = {name: axes for name, (axes, _) in STACKED.items()}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, (_, shape) in STACKED.items()}
    grads = {name: jnp.zeros((3, *shape)) for name, (_, shape) in STACKED.items()}
    got = run(optimizer, axes, params, grads)
    rates = {'in_proj': 0.3, 'w_up': 0.3} if optimizer == 'muon' else {'in_proj': 0.1, 'w_up': 0.1}
    for name in STACKED:
        rate = (rates | {'x_proj': 0.1}).get(name, 0.0)
        np.testing.assert_allclose(got[name], params[name] * (1 - rate * 0.05) ** 3, rtol=1e-5, err_msg=name)


def test_muon_updates_are_orthogonal():
    """Singular values of a Muon step: within [0.5, 1.5] of rate * sqrt(max(1, outputs / inputs)), layer by layer."""
    rng = np.random.default_rng(10)
    axes = {'w': ('layers', 'embed', 'mlp')}
    params = {'w': jnp.zeros((2, 12, 48))}
    grads = {'w': jnp.asarray(rng.normal(size=(1, 2, 12, 48)) * [[[[1e-3]], [[9.0]]]], jnp.float32)}
    config = configs.default().optim
    config.update(name='muon', muon_learning_rate=0.1)
    transform = optim.make_optimizer(config, axes)
    updates, _ = transform.update({'w': grads['w'][0]}, transform.init(params), params)
    values = np.linalg.svd(updates['w'], compute_uv=False) / (0.1 * 2.0)
    assert values.min() > 0.5 and values.max() < 1.5


def test_adamw_is_the_published_rule():
    """Loshchilov and Hutter (2019), algorithm 2, by hand for one matrix."""
    rng = np.random.default_rng(11)
    w, grads = rng.normal(size=(4, 5)), rng.normal(size=(3, 4, 5))
    got = run(
        'adamw',
        {'w': ('embed', 'mlp')},
        {'w': jnp.asarray(w, jnp.float32)},
        {'w': jnp.asarray(grads, jnp.float32)},
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    m = v = 0
    for t, g in enumerate(grads, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6) + 0.05 * w)
    np.testing.assert_allclose(got['w'], w, rtol=1e-5, atol=1e-6)
