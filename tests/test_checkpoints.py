"""Checkpoints: what is saved comes back bit for bit or not at all."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax.errors import UserError
from mixcon_jax.runs.checkpoints import Checkpoints, Meta
from mixcon_jax.runs.checksums import PIECE, _on_host, _sums, checksums
from mixcon_jax.runs.weights import load_params
from mixcon_jax.trees import named_leaves

# Orbax drops its pending reads when one of them fails.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """As in step.py, of anything."""

    step: Any
    params: Any
    buffers: Any
    opt_state: Any


def mesh(shape: tuple[int, int]) -> jax.sharding.Mesh:
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)


def make_state(step: int, seed: int = 0, shape: tuple[int, int] = (1, 1)) -> TrainState:
    """A state with odd shapes and several types, spread over a mesh where its dimensions allow it."""
    rng = np.random.default_rng([seed, step])
    grid = mesh(shape)

    def place(value: np.ndarray | jax.Array) -> jax.Array:
        first = 'a' if value.ndim and value.shape[0] % shape[0] == 0 else None
        second = 'b' if value.ndim > 1 and value.shape[1] % shape[1] == 0 else None
        return jax.device_put(value, NamedSharding(grid, PartitionSpec(*(first, second)[: value.ndim])))

    weights = lambda *dims: rng.standard_normal(dims).astype(np.float32)
    params = {'embedding': weights(8, 12), 'blocks': {'layers': {'0': {'w': weights(2, 3, 5), 'A_log': weights(7)}}}}
    moments = {'embedding': weights(8, 12).astype(jnp.bfloat16), 'scale': weights(1)}
    state = TrainState(
        step=jnp.int32(step), params=params, buffers={'router_bias': weights(2, 4)},
        opt_state=({'mu': moments}, {'count': np.int32(step)}),
    )  # fmt: skip
    return jax.tree.map(place, state)


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def meta(step: int, loss: float | None = None) -> Meta:
    return Meta(step, {'seed': 1, 'betas': (0.9, 0.95)}, '{"model": "é"}', ('stdlib-1',), 10 * step, loss)


def assert_same(a: TrainState, b: TrainState) -> None:
    a, b = named_leaves(a), named_leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), name


def save(folder: Path, steps: list[int], losses: dict[int, float] | None = None, **options) -> None:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(make_state(step), meta(step, (losses or {}).get(step)))
    checkpoints.wait()
    checkpoints.close()


# ----- checksums -----


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool', 'float16'])
@pytest.mark.parametrize('dims', [(), (1,), (13,), (3, 5), (2, 3, 7)])
def test_checksum_changes_with_any_bit_and_place(dims, dtype):
    rng = np.random.default_rng(sum(dims))
    value = (
        rng.integers(0, 2, dims).astype(dtype)
        if dtype == 'bool'
        else rng.integers(1, 99, dims).astype(jnp.dtype(dtype))
    )
    array = jnp.asarray(value)
    assert np.array_equal(_sums(array), _on_host(array))  # on a device and on the host
    (reference,) = checksums({'x': array}).values()
    raw = value.tobytes()
    for byte in range(len(raw)):
        flipped = bytearray(raw)
        flipped[byte] ^= 1 if dtype == 'bool' else 1 << rng.integers(8)
        other = np.frombuffer(bytes(flipped), value.dtype).reshape(dims)
        assert checksums({'x': jnp.asarray(other)})['x'] != reference
    rolled = np.roll(value.reshape(-1), 1).reshape(dims)
    if rolled.tobytes() != raw:
        assert checksums({'x': jnp.asarray(rolled)})['x'] != reference


@pytest.mark.parametrize('dims', [(8,), (4, 6), (2, 3, 16)])
def test_checksum_does_not_depend_on_the_mesh(dims):
    value = np.random.default_rng(sum(dims)).standard_normal(dims).astype(np.float32)
    expected = _on_host(jnp.asarray(value))
    for axis, size in enumerate(dims):
        shards = max(n for n in range(1, 9) if size % n == 0)
        spread = jax.device_put(value, NamedSharding(mesh((shards, 1)), PartitionSpec(*[None] * axis, 'a')))
        assert np.array_equal(_sums(spread), expected) and np.array_equal(_on_host(spread), expected)


def test_checksum_of_more_than_one_piece():
    value = jnp.arange(2 * PIECE + 77, dtype=jnp.float32)
    assert np.array_equal(_sums(value), _on_host(value))


# ----- saving and restoring -----


@pytest.mark.parametrize('shapes', [((1, 1), (1, 1)), ((2, 2), (4, 1)), ((8, 1), (1, 1)), ((1, 1), (2, 4))])
def test_restores_bit_for_bit_onto_any_mesh(tmp_path, shapes):
    saved, wanted = make_state(7, shape=shapes[0]), make_state(0, seed=1, shape=shapes[1])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(saved, meta(7, 1.5))
    checkpoints.wait()
    restored, found = checkpoints.restore(abstract(wanted))
    assert_same(restored, saved)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)
    assert dataclasses.replace(found, config={}) == dataclasses.replace(meta(7, 1.5), config={})
    assert found.config == {'seed': 1, 'betas': [0.9, 0.95]}
    checkpoints.close()


def test_the_saved_values_are_those_at_the_call_though_buffers_are_reused(tmp_path):
    """Training donates the state to the next step while the save still runs."""
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    state = make_state(3)
    checkpoints.save(state, meta(3))
    overwrite(state)
    checkpoints.wait()
    assert_same(checkpoints.restore(abstract(make_state(3)))[0], make_state(3))
    checkpoints.close()


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 5: float('nan'), 6: 4.0}
    save(tmp_path, [1, 2, 3, 4, 5, 6], losses, keep_last=2, keep_best=1)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best_step() == 2
    _, found = load_params(tmp_path.parent, 'best') if tmp_path.name == 'checkpoints' else checkpoints.load('best')
    assert found.step == 2
    checkpoints.close()


def test_without_evaluations_only_the_newest_are_kept(tmp_path):
    save(tmp_path, [1, 2, 3, 4], keep_last=2, keep_best=1)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [3, 4]
    with pytest.raises(UserError, match='held-out loss'):
        checkpoints.load('best')
    checkpoints.close()


def test_what_a_kill_between_saving_and_pruning_left_goes_when_the_run_goes_on(tmp_path):
    save(tmp_path, [1, 2, 3, 4], {2: 1.0}, keep_last=4)
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    assert checkpoints.restore(abstract(make_state(4))) is not None
    assert checkpoints.steps() == [1, 2, 3, 4]
    checkpoints.prune()
    assert checkpoints.steps() == [2, 3, 4]
    checkpoints.close()


def test_nothing_to_restore_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    assert checkpoints.restore(abstract(make_state(0))) is None
    checkpoints.close()


def test_another_model_is_an_error_that_names_the_parameter(tmp_path):
    save(tmp_path, [1])
    wanted = abstract(make_state(0))
    wanted.params['embedding'] = jax.ShapeDtypeStruct(
        (8, 16), jnp.float32, sharding=wanted.params['embedding'].sharding
    )
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r'params/embedding.*\[8, 16\]'):
        checkpoints.restore(wanted)
    assert checkpoints.steps() == [1]
    checkpoints.close()


def flip(path: Path, seed: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[np.random.default_rng(seed).integers(len(raw))] ^= 0x40
    path.write_bytes(bytes(raw))


# ----- parameters alone -----


def test_load_params_gives_the_model_alone_and_changes_nothing(tmp_path):
    save(tmp_path / 'checkpoints', [2, 4], {2: 1.0, 4: 2.0})
    for step, expected in ((None, 4), ('best', 2), (2, 2)):
        tree, found = load_params(tmp_path, step)
        assert found.step == expected and found.tokenizer == '{"model": "é"}'
        assert_same(tree['params'], make_state(expected).params)
        assert_same(tree['buffers'], make_state(expected).buffers)
    grid = mesh((4, 2))
    tree, _ = load_params(tmp_path, 4, {'params/embedding': NamedSharding(grid, PartitionSpec('a', 'b'))})
    assert_same(tree['params'], make_state(4).params)
    assert len(tree['params']['embedding'].sharding.device_set) == 8
    # Damage: the one before is used, and nothing is renamed.
    flip(tmp_path / 'checkpoints' / '4' / 'meta' / 'metadata')
    said: list[str] = []
    assert load_params(tmp_path, say=said.append)[1].step == 2
    assert len(said) == 1 and (tmp_path / 'checkpoints' / '4').exists()
    with pytest.raises(UserError, match='checkpoint 4'):
        load_params(tmp_path, 4, say=said.append)
    with pytest.raises(UserError, match='no checkpoint 3'):
        load_params(tmp_path, 3)
    with pytest.raises(UserError, match='holds no checkpoints'):
        load_params(tmp_path / 'checkpoints')


def test_metadata_is_readable_without_this_program(tmp_path):
    save(tmp_path, [2])
    contents = json.loads((tmp_path / '2' / 'meta' / 'metadata').read_text())['contents']
    assert contents['step'] == 2 and contents['arrays']['params/embedding'] == ['float32', [8, 12]]
