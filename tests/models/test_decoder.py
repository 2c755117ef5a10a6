"""The whole model: stacking, names of initial values, packing through the loss, decoding, rematerialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.loss import cross_entropy
from mixcon_jax.models import kinds, presets
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import abstract, create
from mixcon_jax.models.pattern import parse_layer
from tests.models.cases import called, fitting, model_config, packed_context, perturbed

HYBRID = ('conba+mlp', 'conba+moe', 'attention|mlp', 'mamba')
MIXCON = ('conba+moe', 'attention+mlp')


def config(pattern=HYBRID, num_blocks=2, **options):
    options = {'pattern': tuple(pattern), 'num_blocks': num_blocks, 'moe.num_experts': 3} | options
    return model_config({key.replace('__', '.'): value for key, value in options.items()})


@functools.cache
def model(pattern=HYBRID, num_blocks=2, seed=0):
    return perturbed(create(config(pattern, num_blocks), seed), seed + 1, scale=0.1)


def tokens(seed, batch=2, length=12):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 64)


def test_scanned_blocks_equal_the_blocks_one_after_another():
    m, ids = model(), tokens(0)
    context = Context.whole(*ids.shape)
    hidden, _, aux = called(m, ids, context)
    x = m.embedding[...][ids]
    graphdef, variables = nnx.split(m.blocks)
    run = jax.jit(lambda variables, x: nnx.merge(graphdef, variables)(x, context, None))
    for i in range(2):
        x, _, block_aux = run(jax.tree.map(lambda value, i=i: value[i], variables), x)
        np.testing.assert_allclose(
            aux['stats']['layer_1/moe_load'][i], block_aux['stats']['layer_1/moe_load'], rtol=1e-5
        )
    np.testing.assert_allclose(hidden, m.final_norm(x), rtol=1e-4, atol=1e-5)


# A policy that keeps some values could go wrong in more ways than one that keeps none.
@pytest.mark.parametrize(
    'remat', ['selective', *(pytest.param(name, marks=pytest.mark.slow) for name in ('block', 'dots'))]
)
def test_rematerialisation_changes_no_gradient(remat):
    ids = tokens(1)

    def gradient(remat):
        graphdef, params = nnx.split(create(config(MIXCON, remat=remat), 0), nnx.Param)
        loss = lambda params: jnp.sum(nnx.merge(graphdef, params)(ids, Context.whole(*ids.shape))[0] ** 3)
        return jax.jit(jax.grad(loss))(params)

    for a, b in zip(jax.tree.leaves(gradient('none')), jax.tree.leaves(gradient(remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def products(pattern, **options):
    """Matrix products in the program of a model's gradient; those in a loop count once."""
    graphdef, params = nnx.split(abstract(config(pattern, **options)), nnx.Param)

    def loss(params, ids):
        hidden, _, aux = nnx.merge(graphdef, params)(ids, Context.whole(*ids.shape))
        return jnp.sum(hidden.astype(jnp.float32)) + sum(value.value for value in aux['losses'].values())

    ids = jax.ShapeDtypeStruct((2, 12), jnp.int32)
    return jax.jit(jax.grad(loss)).lower(params, ids).as_text().count('stablehlo.dot_general')


@pytest.mark.parametrize('dtype', [pytest.param('float32', marks=pytest.mark.slow), 'bfloat16'])
@pytest.mark.parametrize('pattern', [('attention+mlp',), ('attention|mlp',), ('attention+moe',), ('mamba+mlp',)])
def test_selective_rematerialisation_repeats_no_matrix_product(pattern, dtype):
    """Loops of attention and grouped products neither: they would be here once more."""
    options = {'dtype': dtype, 'attention__block_size': 4, 'moe__implementation': 'grouped', 'moe__group_block': 4}
    plain, selective = (products(pattern, remat=remat, **options) for remat in ('none', 'selective'))
    assert 0 < selective <= plain < products(pattern, remat='block', **options)


def test_blocks_written_out_equal_the_loop():
    def run(unroll):
        m = perturbed(create(config(('attention+mlp',), 3, unroll=unroll), 0), 1, scale=0.1)
        return called(m, tokens(0), Context.whole(2, 12))[0]

    want = run(1)
    for unroll in (2, 3):
        np.testing.assert_allclose(run(unroll), want, rtol=1e-4, atol=1e-5)


def test_initial_values_are_keyed_by_name_and_layer():
    """Arms of an ablation share the values of what they share, however the layers are grouped into blocks."""
    a = create(config(('conba+mlp', 'attention+mlp'), 2), 0)
    b = create(config(('conba+mlp', 'attention+mlp', 'mamba+mlp', 'attention+mlp'), 1), 0)
    for layer in range(4):
        block, j = divmod(layer, 2)
        for name in ('w_gate', 'w_down'):
            ours = getattr(a.blocks.layers[j].ffn, name)[...][block]
            np.testing.assert_array_equal(ours, getattr(b.blocks.layers[layer].ffn, name)[...][0])
    mixer, other = a.blocks.layers[0].mixer, b.blocks.layers[2].mixer  # Conba and Mamba at layer 2
    np.testing.assert_array_equal(mixer.in_proj[...][1], other.in_proj[...][0])
    np.testing.assert_array_equal(a.embedding[...], b.embedding[...])
    assert jnp.abs(a.blocks.layers[0].ffn.w_up[...][0] - a.blocks.layers[0].ffn.w_up[...][1]).max() > 0.01
    assert jnp.abs(create(config(), 1).embedding[...] - create(config(), 0).embedding[...]).max() > 0.01


def test_every_parameter_names_its_axes():
    for path, variable in nnx.to_flat_state(nnx.state(model(), nnx.Param)):
        axes = variable.get_metadata()['logical_axes']
        assert len(axes) == variable.ndim, path
        assert (axes[0] == 'layers') == (path[0] == 'blocks'), path


LENGTHS = [5, 1, 6]


# The default is always run; of every layer by itself, test_invariants.py asks the same.
PACKED = [name if name == 'conba' else pytest.param(name, marks=pytest.mark.slow) for name in presets.CONBA_PRESETS]


@pytest.mark.parametrize('preset', PACKED)
def test_packed_cross_entropy_and_gradients_equal_separate_documents(preset):
    """Through the whole MixCon, experts included, balance coefficients 0, float32."""
    options = {f'conba.{key}': value for key, value in presets.conba(preset).items()}
    options |= {'pattern': MIXCON, 'moe.num_experts': 3, 'moe.implementation': 'grouped', 'moe.group_block': 4}
    graphdef, params = nnx.split(perturbed(create(model_config(options), 0), 1, scale=0.1), nnx.Param)
    total = sum(LENGTHS) + 2
    ids, targets = tokens(2, 1, total), tokens(3, 1, total)

    def loss(params, ids, targets, context):
        m = nnx.merge(graphdef, params)
        hidden, _, _ = m(ids, context)
        return cross_entropy(hidden, m.head(), targets, context.mask, chunk=4).nll / sum(LENGTHS)

    longest, starts = max(LENGTHS), np.cumsum([0, *LENGTHS[:-1]])
    row = lambda x: jnp.stack([jnp.pad(x[0, s : s + n], (0, longest - n)) for s, n in zip(starts, LENGTHS)])
    alone = jax.tree.map(lambda *rows: jnp.concatenate(rows), *(packed_context([n], longest) for n in LENGTHS))
    graded = jax.jit(jax.value_and_grad(loss))
    packed = graded(params, ids, targets, packed_context(LENGTHS, total))
    separate = graded(params, row(ids), row(targets), alone)
    (value, grads), (expected, expected_grads) = packed, separate
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for (path, got), (_, want) in zip(nnx.to_flat_state(grads), nnx.to_flat_state(expected_grads), strict=True):
        scale = float(jnp.abs(want[...]).max())
        np.testing.assert_allclose(got[...], want[...], rtol=1e-5, atol=1e-5 * scale, err_msg=str(path))


@pytest.mark.parametrize('num_blocks', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_decoding_equals_the_forward_pass(num_blocks):
    m, ids = model(num_blocks=num_blocks), tokens(4)
    expected, _, _ = called(m, ids, Context.whole(*ids.shape))
    graphdef, variables = nnx.split(m)
    step = jax.jit(lambda v, ids, context, state: nnx.merge(graphdef, v)(ids, context, state))
    state, outputs = m.init_state(2, 12), []
    for start, stop in [(0, 5), *((t, t + 1) for t in range(5, 12))]:
        hidden, state, _ = step(variables, ids[:, start:stop], Context.whole(2, stop - start, start), state)
        outputs.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=2e-4, atol=2e-5)


def test_tied_embeddings_are_the_head():
    tied = create(config(tie_embeddings=True), 0)
    np.testing.assert_array_equal(tied.head(), tied.embedding[...].T)
    assert not hasattr(tied, 'output')


@pytest.mark.parametrize(
    'text, expected',
    [
        ('mamba', ('mamba', '', False)),
        ('conba+moe', ('conba', 'moe', False)),
        ('attention|mlp', ('attention', 'mlp', True)),
    ],
)
def test_layers_are_parsed(text, expected):
    assert tuple(parse_layer(text)) == expected


def test_hybrid_builds_the_papers_block():
    paper = 'conba+mlp conba+moe conba+mlp attention+moe attention+mlp conba+moe conba+mlp conba+moe'
    assert presets.hybrid(attention=2, conba=6, moe_every=2) == tuple(paper.split())
    jamba = presets.hybrid(attention=1, conba=7, moe_every=2, mixer='mamba')
    assert [spec.split('+')[0] for spec in jamba].index('attention') == 4


MIXERS = [name if name == 'hyena' else pytest.param(name, marks=pytest.mark.slow) for name in kinds.names('mixer')]


@pytest.mark.parametrize('mixer', MIXERS)
def test_blocks_decode_by_their_own_weights(mixer):
    """A state may hold what a block's weights come to, as Hyena's filters: two blocks, each by its own."""
    module = perturbed(create(model_config(fitting(mixer) | {'num_blocks': 2})), 1, scale=0.1)
    row = tokens(1, length=9)
    want, _, _ = called(module, row, Context.whole(2, 9), None)
    state, outputs = module.init_state(2, 12), []
    for start, size in ((0, 7), (7, 1), (8, 1)):
        x, state, _ = called(module, row[:, start : start + size], Context.whole(2, size, start), state)
        outputs.append(x)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, rtol=2e-4, atol=2e-5)
