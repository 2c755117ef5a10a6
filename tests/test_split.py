"""Kernels' calls on a mesh: what may be shared out is, needs no communication there, and changes no result."""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from kernels_pallas.adaptive_gain.context_parallel import DIAGONAL, MATRIX
from kernels_pallas.attention.context_parallel import CALL as ATTENTION
from kernels_pallas.causal_conv1d.context_parallel import CALL as CAUSAL_CONV1D
from kernels_pallas.delta_rule.context_parallel import CALL as DELTA_RULE
from kernels_pallas.long_conv.context_parallel import CALL as LONG_CONV
from kernels_pallas.modal_conv.context_parallel import CALL as MODAL_CONV
from kernels_pallas.selective_scan import api as selective_scan
from kernels_pallas.selective_scan.context_parallel import CALL as SELECTIVE_SCAN
from kernels_pallas.ssd.context_parallel import CALL as SSD
from kernels_pallas.wkv.context_parallel import CALL as WKV
from mixcon_jax import config as configs
from mixcon_jax import step
from mixcon_jax.parallel import kernels, layout
from mixcon_jax.parallel.axes import RULES
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.parallel.rules import on_mesh
from mixcon_jax.parallel.shared import shared
from tests.training import mesh_of, random_batch, step_config

B, T, D = 2, 6, 4


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


GAIN = {'e': normal(B, T, 2, 3), 'alpha': jax.nn.sigmoid(normal(B, T, 2)), 'log_decay': -(normal(B, T, 2) ** 2)}
CALLS = {
    'selective_scan': {
        'u': normal(B, T, D), 'dt': jax.nn.softplus(normal(B, T, D)), 'A': -jnp.exp(normal(D, 3)), 'B': normal(B, T, 3),
        'C': normal(B, T, 3), 'D': normal(D), 'z': normal(B, T, D), 'initial_state': normal(B, D, 3),
        'readout': (None, None, normal(3, 3)), 'prior': True,
    },
    'matrix_gain': GAIN,
    'diagonal_gain': GAIN,
    'causal_conv1d': {
        'x': normal(B, T, D), 'weight': normal(3, D), 'bias': normal(D), 'initial_state': normal(B, 2, D),
    },
    'ssd': {
        'x': normal(B, T, 4, 3), 'log_decay': -(normal(B, T, 4, 5) ** 2), 'B': normal(B, T, 2, 5),
        'C': normal(B, T, 2, 5), 'step': normal(B, T, 4) ** 2, 'initial_state': normal(B, 4, 3, 5),
    },
    'delta_rule': {
        'x': normal(B, T, 4, 3), 'log_decay': -(normal(B, T, 4, 5) ** 2), 'B': normal(B, T, 4, 5),
        'C': normal(B, T, 4, 5), 'removed': 0.4 * normal(B, T, 4, 5), 'rewritten': 0.3 * normal(B, T, 4, 5),
        'initial_state': normal(B, 4, 3, 5),
    },
    'wkv': {
        'k': normal(B, T, D), 'v': normal(B, T, D), 'decay': normal(D) ** 2, 'bonus': normal(D),
        'initial_state': jnp.abs(normal(B, 3, D)),
    },
    'modal_conv': {
        'v': normal(B, T, D), 'rate': normal(3, D) ** 2, 'angle': normal(3, D), 'residue': normal(2, 3, D),
        'skip': normal(D), 'initial_state': normal(B, 2, 3, D),
    },
    'long_conv': {
        'v': normal(B, T, D), 'taps': normal(T, D), 'skip': normal(D), 'initial_state': normal(B, 3, D), 'block': 2,
    },
    'attention': {'q': normal(B, T, 4, 8), 'k': normal(B, T, 2, 8), 'v': normal(B, T, 2, 8)},
}  # fmt: skip


def mesh(**axes: int):
    config = configs.default().mesh
    config.update({'data': 1} | axes)
    return make_mesh(config, jax.devices()[: int(np.prod(list(axes.values())))])


CONVOLUTIONS = ('long_conv', 'modal_conv')
BOTH, ROWS = {'data': 2, 'tensor': 2}, {'data': 2}


LATE = ('ssd', 'delta_rule', 'wkv', *CONVOLUTIONS)


def on_axes(axes, broad):
    """Every call on every mesh, `broad` ones of the later calls slow: rows are shared out alike."""
    late = lambda name, mesh: [pytest.mark.slow] if name in LATE and mesh == broad else []
    return [
        pytest.param(name, mesh, marks=late(name, mesh), id='-'.join((name, *mesh))) for name in CALLS for mesh in axes
    ]


@pytest.mark.parametrize('name, axes', on_axes([{'tensor': 2}, BOTH], BOTH))
def test_channels_and_heads_are_shared_out_without_communication(name, axes):
    function, on = getattr(kernels, name), mesh(**axes)
    arrays = {key: value for key, value in CALLS[name].items() if isinstance(value, jax.Array)}
    run = functools.partial(function, **{key: value for key, value in CALLS[name].items() if key not in arrays})

    def on_mesh(arrays):
        with jax.sharding.use_abstract_mesh(on.abstract_mesh):
            return run(**arrays)

    text = str(jax.make_jaxpr(on_mesh)(arrays))
    assert 'shard_map' in text
    assert not [word for word in ('psum', 'all_gather', 'ppermute', 'all_to_all') if word in text]
    found = jax.jit(on_mesh)(jax.device_put(arrays, layout.replicated(on)))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, jax.jit(lambda arrays: run(**arrays))(arrays))


@pytest.mark.parametrize('name, axes', on_axes([{'tensor': 2}, ROWS, {'context': 2}], ROWS))
def test_gradients_on_a_mesh_are_those_of_one_device(name, axes):
    """Of every array, those included that are whole on every device; on a shared-out sequence the outputs, too."""
    function, on = getattr(kernels, name), mesh(**axes)
    arrays = {key: value for key, value in CALLS[name].items() if isinstance(value, jax.Array)}
    run = functools.partial(function, **{key: value for key, value in CALLS[name].items() if key not in arrays})
    stateless = (
        name in ('causal_conv1d', 'long_conv') and 'context' in axes
    )  # on shared-out tokens it neither takes nor gives a state
    if stateless:
        del arrays['initial_state']

    def loss(arrays):
        found = run(**arrays)[0] if stateless else run(**arrays)
        return sum(jnp.vdot(leaf, normal(*leaf.shape)) for leaf in jax.tree.leaves(found)), found

    def on_mesh(arrays):
        with jax.sharding.use_abstract_mesh(on.abstract_mesh):
            return jax.grad(loss, has_aux=True)(arrays)

    assert 'shard_map' in str(jax.make_jaxpr(on_mesh)(arrays))
    found = jax.jit(on_mesh)(jax.device_put(arrays, layout.replicated(on)))
    want = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    assert all(jnp.abs(gradient).max() > 0 for gradient in want[0].values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, want)


def test_what_shares_a_mesh_axis_is_split_together_or_not_at_all():
    """One key head cannot be halved, so that its query heads stay together, too."""
    arguments = CALLS['attention'] | {'k': normal(B, T, 1, 8), 'v': normal(B, T, 1, 8)}
    with jax.sharding.use_abstract_mesh(mesh(tensor=2).abstract_mesh):
        assert 'shard_map' not in str(jax.make_jaxpr(lambda a: kernels.attention(**a))(arguments))
        assert 'shard_map' in str(jax.make_jaxpr(lambda a: kernels.attention(**a))(CALLS['attention']))


def test_a_reset_that_another_device_knows_keeps_the_sequence_whole():
    arguments = {'x': normal(B, T, D), 'weight': normal(3, D)}
    reset = {'reset': jnp.zeros((B, T), bool).at[:, 0].set(True)}
    positions = {'positions': jnp.broadcast_to(jnp.arange(T), (B, T))}
    with jax.sharding.use_abstract_mesh(mesh(context=2).abstract_mesh):
        text = lambda more: str(jax.make_jaxpr(lambda a: kernels.causal_conv1d(**a)[0])(arguments | more))
        assert 'ppermute' in text(positions) and 'shard_map' not in text(reset)


def test_noise_is_drawn_for_all_rows_at_once():
    noise = {'process_noise': (jax.random.key(0), 0.1), 'readout': None}
    with jax.sharding.use_abstract_mesh(mesh(data=2).abstract_mesh):
        run = lambda a: kernels.selective_scan(**a, prior=True, **noise)
        arrays = {key: value for key, value in CALLS['selective_scan'].items() if isinstance(value, jax.Array)}
        assert 'shard_map' not in str(jax.make_jaxpr(run)(arrays))


def test_what_layers_call_alike_is_traced_once_a_step():
    traced = []

    def times(x, *, by):
        traced.append(by)
        return by[0] * x if isinstance(by, list) else by * x

    def run(x, factors=(2, 2, 3, 2)):
        with on_mesh(mesh(data=2), RULES):
            return functools.reduce(lambda x, by: shared(times, by=by)(x), factors, x + 0)

    assert jax.jit(run)(1.0) == 24 and traced == [2, 3]
    assert jax.make_jaxpr(lambda x: run(x))(1.0) and traced == [2, 3] * 2  # of another step's tracing nothing is left
    assert run(1.0, ([5], [5])) == 25 and traced[4:] == [[5], [5]], 'a list cannot be told from another'
    assert shared(times, by=6)(shared(times, by=6)(1.0)) == 36 and traced[6:] == [6, 6], 'in no step'


def test_a_step_traces_a_kernel_and_a_microbatch_once(monkeypatch):
    """Four layers of two microbatches; three are called alike, one has chunks of its own."""
    chosen, microbatches = [], []
    choose, loss = selective_scan.choose, step.microbatch_loss
    monkeypatch.setattr(selective_scan, 'choose', lambda *args, **kwargs: chosen.append(1) or choose(*args, **kwargs))
    monkeypatch.setattr(step, 'microbatch_loss', lambda *args: microbatches.append(1) or loss(*args))
    config = step_config(train__accum_steps=2, model__pattern=('mamba', 'mamba', 'short', 'mamba'))
    config.model.layers.short = ml_collections.ConfigDict({'kind': 'mamba', 'chunk': 3})
    config = configs.validate(config, 1)
    steps = step.make_steps(config, mesh_of(config))
    steps.train_step.trace(steps.abstract_state, steps.put(random_batch(1, 8, 13)))
    assert (len(chosen), len(microbatches)) == (2, 1)


@pytest.mark.parametrize(
    'call',
    [SELECTIVE_SCAN, MATRIX, DIAGONAL, CAUSAL_CONV1D, ATTENTION, SSD, WKV, DELTA_RULE, LONG_CONV, MODAL_CONV],
    ids=lambda c: c.function.__name__,
)
def test_a_call_is_declared_whole(call):
    """Every dimension that may be split is one of the annotations', under a name that the sharding rules know."""
    dims = {dim for names in call.dims.values() for dim in names}
    assert set(call.axes) <= dims and set(call.axes.values()) <= set(RULES)
    results = call.results({'delay': None, 'prior': True})
    named = {dim for text in ([results] if isinstance(results, str) else results) for dim in text.split()}
    assert named <= dims, 'a name that no argument has would be whole on every device'
    wrapped = getattr(kernels, call.function.__name__)
    assert inspect.signature(wrapped) == inspect.signature(call.function)
