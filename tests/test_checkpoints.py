"""Checkpoints: what is saved comes back bit for bit or not at all."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax.errors import UserError
from mixcon_jax.runs import readback, saved
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


# ----- damage -----


def arrays_of(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob('*') if p.is_file() and p.parent.name == 'd')


def flip(path: Path, seed: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[np.random.default_rng(seed).integers(len(raw))] ^= 0x40
    path.write_bytes(bytes(raw))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    'an array file flipped': lambda step: flip(max(arrays_of(step / 'model'), key=lambda p: p.stat().st_size)),
    'an array file truncated': lambda step: truncate(
        max(arrays_of(step / 'optimizer'), key=lambda p: p.stat().st_size)
    ),
    'all array files missing': lambda step: [path.unlink() for path in arrays_of(step)],
    'an item missing': lambda step: shutil.rmtree(step / 'optimizer'),
    'metadata flipped': lambda step: (step / 'meta' / 'metadata').write_text(
        (step / 'meta' / 'metadata').read_text().replace('"tokens_seen": 40', '"tokens_seen": 41')
    ),
    'metadata truncated': lambda step: truncate(step / 'meta' / 'metadata'),
    'metadata missing': lambda step: (step / 'meta' / 'metadata').unlink(),
    'no longer JSON': lambda step: (step / 'meta' / 'metadata').write_bytes(b'\xff\x00'),
    'empty': lambda step: (shutil.rmtree(step), step.mkdir()),
    'gone': shutil.rmtree,
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, [2, 4])
    DAMAGE[damage](tmp_path / '4')
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    state, found = checkpoints.restore(abstract(make_state(0)), expected=4)
    assert_same(state, make_state(2))
    assert found.step == 2
    assert len(said) == 1 and 'checkpoint 4' in said[0] and '\n' not in said[0]
    assert not (tmp_path / '4').exists()
    assert (tmp_path / '4.damaged').exists() == (damage != 'gone')
    # What was set aside neither counts nor stands in the way of saving that step again.
    checkpoints.save(make_state(4), meta(4))
    checkpoints.wait()
    checkpoints.close()
    again = Checkpoints(tmp_path, say=said.append)
    assert again.steps() == [2, 4]
    assert_same(again.restore(abstract(make_state(0)))[0], make_state(4))
    assert len(said) == 1
    again.close()


def test_no_flipped_byte_anywhere_restores_other_values(tmp_path):
    """Every file of a checkpoint, several bytes each: either it is noticed, or what comes back is what was saved."""
    save(tmp_path / 'intact', [2, 4])
    noticed = 0
    for file in sorted(path for path in (tmp_path / 'intact' / '4').rglob('*') if path.is_file()):
        for seed in range(2):
            shutil.rmtree(tmp_path / 'copy', ignore_errors=True)
            shutil.copytree(tmp_path / 'intact', tmp_path / 'copy')
            flip(tmp_path / 'copy' / file.relative_to(tmp_path / 'intact'), seed)
            checkpoints = Checkpoints(tmp_path / 'copy', say=lambda line: None)
            state, found = checkpoints.restore(abstract(make_state(0)))
            checkpoints.close()
            assert found == dataclasses.replace(meta(found.step), config=found.config)
            assert found.config['seed'] == 1
            assert_same(state, make_state(found.step))
            noticed += found.step == 2
    assert noticed > 5


def test_when_all_are_damaged_it_is_an_error_and_not_a_new_start(tmp_path):
    save(tmp_path, [2, 4])
    for step in ('2', '4'):
        flip(tmp_path / step / 'meta' / 'metadata')
    checkpoints = Checkpoints(tmp_path, say=lambda line: None)
    with pytest.raises(UserError, match='no intact checkpoint'):
        checkpoints.restore(abstract(make_state(0)))
    # Nor does the next start take the emptied folder for a new run.
    with pytest.raises(UserError, match='no intact checkpoint'):
        checkpoints.restore(abstract(make_state(0)), expected=4)
    checkpoints.close()


def test_leftovers_of_a_killed_save_do_not_count_and_are_removed(tmp_path):
    save(tmp_path, [2])
    shutil.copytree(tmp_path / '2', tmp_path / '4.orbax-checkpoint-tmp')
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ['2']
    checkpoints.close()


# ----- what a save wrote -----


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_save_that_cannot_be_read_back_is_no_checkpoint(tmp_path, monkeypatch, damage):
    """Whatever spoils it, and though one alone is kept: the one before it stays, and the run does not go on."""
    save(tmp_path, [2], keep_last=1, keep_best=0)
    original = readback.verify
    monkeypatch.setattr(
        readback,
        'verify',
        lambda folder, step, digest: (DAMAGE[damage](folder / str(step)), original(folder, step, digest)),
    )
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(make_state(4), meta(4))
    with pytest.raises(UserError, match=r'checkpoint 4 .*cannot be read back.*checkpoint 2 is intact') as error:
        checkpoints.wait()
    checkpoints.close()
    assert '\n' not in str(error.value)
    again = Checkpoints(tmp_path, say=lambda line: None)
    assert again.steps() == [2]
    assert_same(again.restore(abstract(make_state(0)))[0], make_state(2))
    again.close()


def test_what_is_verified_loads(tmp_path):
    """Whatever file of a checkpoint is cut to nothing or missing: either it is noticed, or everything comes back."""
    save(tmp_path / 'intact', [4])
    digest, passed = saved.digest(saved.contents(tmp_path / 'intact', 4)), 0
    for file in sorted(path for path in (tmp_path / 'intact' / '4').rglob('*') if path.is_file()):
        for spoil in (lambda path: path.write_bytes(b''), Path.unlink):
            shutil.rmtree(tmp_path / 'copy', ignore_errors=True)
            shutil.copytree(tmp_path / 'intact', tmp_path / 'copy')
            spoil(tmp_path / 'copy' / file.relative_to(tmp_path / 'intact'))
            try:
                readback.verify(tmp_path / 'copy', 4, digest)
            except saved.Damaged:
                continue
            checkpoints = Checkpoints(tmp_path / 'copy', read_only=True)
            assert_same(checkpoints.restore(abstract(make_state(0)))[0], make_state(4))
            checkpoints.close()
            passed += 1
    assert passed > 2
    readback.verify(tmp_path / 'intact', 4, digest)


def test_a_checkpoint_that_lost_part_of_a_file_is_seen_to_be_no_whole_one(tmp_path):
    """Without reading arrays; of an earlier version's, which has no list of its files, what is there shows it."""
    save(tmp_path / 'intact', [4])
    assert saved.is_whole(tmp_path / 'intact', 4)
    for file in sorted(path for path in (tmp_path / 'intact' / '4').rglob('*') if path.is_file()):
        for spoil in (lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink):
            shutil.rmtree(tmp_path / 'copy', ignore_errors=True)
            shutil.copytree(tmp_path / 'intact', tmp_path / 'copy')
            spoil(tmp_path / 'copy' / file.relative_to(tmp_path / 'intact'))
            assert saved.is_whole(tmp_path / 'copy', 4) == (file.name == 'files')
    shutil.copytree(tmp_path / 'intact', tmp_path / 'older')
    (tmp_path / 'older' / '4' / saved.FILES).unlink()
    assert saved.is_whole(tmp_path / 'older', 4)
    shutil.rmtree(tmp_path / 'older' / '4' / 'model')
    (tmp_path / 'older' / '4' / 'model').mkdir()
    assert not saved.is_whole(tmp_path / 'older', 4)


def test_a_checkpoint_that_cannot_be_deleted_is_said_and_ends_nothing(tmp_path, monkeypatch):
    said: list[str] = []
    checkpoints, rename = Checkpoints(tmp_path, keep_last=1, keep_best=0, say=said.append), os.rename

    def refuse(path, target):
        if 'deleted' in str(target):
            raise PermissionError(errno.EACCES, 'Permission denied')
        rename(path, target)

    monkeypatch.setattr(os, 'rename', refuse)
    for step in (1, 2):
        checkpoints.save(make_state(step), meta(step))
    assert checkpoints.wait() == 2 and checkpoints.steps() == [1, 2]
    assert said == [f'checkpoint 1 in {tmp_path} cannot be deleted (Permission denied); it stays']
    monkeypatch.undo()
    checkpoints.save(make_state(3), meta(3))
    assert checkpoints.wait() == 3 and checkpoints.steps() == [3] and len(said) == 1
    checkpoints.close()


@pytest.mark.parametrize('instead', [None, 'a folder'])
def test_a_link_that_is_cleared_away_loses_nothing(tmp_path, monkeypatch, instead):
    """As by what removes temporary files while a run goes on: between saves, and while one is read."""
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    folder, said = tmp_path / '[x]' / 'checkpoints', []
    checkpoints = Checkpoints(folder, say=said.append)

    def clear_away():
        (link,) = tmp_path.glob('mixcon-*')
        shutil.rmtree(link)
        if instead:
            (link / 'checkpoints' / '1').mkdir(parents=True)

    checkpoints.save(make_state(1), meta(1))
    checkpoints.wait()
    clear_away()
    checkpoints.save(make_state(2), meta(2))
    assert checkpoints.wait() == 2 and saved.steps(folder) == [1, 2]
    clear_away()
    assert_same(checkpoints.restore(abstract(make_state(0)))[0], make_state(2))
    # A save that went elsewhere is none.
    verify = readback.verify
    lose = lambda *args: (os.rename(folder / '3', tmp_path / 'elsewhere'), verify(*args))
    monkeypatch.setattr(readback, 'verify', lose)
    checkpoints.save(make_state(3), meta(3))
    with pytest.raises(UserError, match=r'checkpoint 3 .*cannot be read back.*checkpoint 2 is intact'):
        checkpoints.wait()
    checkpoints.close()
    assert saved.steps(folder) == [1, 2] and not said and not list(tmp_path.glob('mixcon-*'))


def test_an_older_checkpoint_goes_only_when_the_new_one_is_read_back(tmp_path, monkeypatch):
    save(tmp_path, [2], keep_last=1, keep_best=0)
    seen, original = [], readback.verify
    monkeypatch.setattr(readback, 'verify', lambda *args: (seen.append(saved.steps(tmp_path)), original(*args)))
    save(tmp_path, [4], keep_last=1, keep_best=0)
    assert seen == [[2, 4]] and saved.steps(tmp_path) == [4]


@pytest.mark.parametrize(
    'name', ['[a]', 'a[', '*', '?', '{a,b}', 'a\\b', '%5B', '#x', '$HOME', ' a ', 'new\nline', 'é', 'gs:a']
)
def test_any_name_of_a_folder_is_taken_literally(tmp_path, name):
    folder = tmp_path / name / 'checkpoints'
    save(folder, [2, 4, 6])
    assert saved.steps(folder) == [4, 6]
    said: list[str] = []
    flip(folder / '6' / 'meta' / 'metadata')
    checkpoints = Checkpoints(folder, say=said.append)
    assert_same(checkpoints.restore(abstract(make_state(0)))[0], make_state(4))
    checkpoints.close()
    assert (folder / '6.damaged').is_dir() and load_params(folder.parent)[1].step == 4
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ----- a full disk -----

FULL_DISK = """
    import jax.numpy as jnp, sys
    from mixcon_jax.runs.checkpoints import Checkpoints, Meta
    from mixcon_jax.errors import UserError
    import numpy as np
    checkpoints = Checkpoints('checkpoints')
    for step, size in ((1, 100), (2, 4_000_000)):
        noise = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        arrays = {f'w{i}': part for i, part in enumerate(jnp.split(jnp.asarray(noise), 50))}
        state = {'params': arrays, 'step': jnp.int32(step)}
        try:
            checkpoints.save(state, Meta(step, {}))
            checkpoints.wait()
        except UserError as error:
            print('error:', error)
            sys.exit(2)
"""


def run(script: str, folder: Path, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    # Without bytecode: Python keeps what the limit has cut short of it, and every later import would stumble over that.
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1]), 'XLA_FLAGS': ''}
    environment |= {'PYTHONDONTWRITEBYTECODE': '1'}
    command = [*prefix, sys.executable, '-c', textwrap.dedent(script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def assert_one_line_and_intact(done: subprocess.CompletedProcess, folder: Path) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith('error: cannot save checkpoint 2') and done.stdout.count('\n') == 1
    assert 'checkpoint 1 is intact' in done.stdout
    assert 'Error' not in done.stderr and 'Traceback' not in done.stderr
    # Writes under way may leave a folder that does not count and that the next start removes.
    assert [path.name for path in (folder / 'checkpoints').iterdir() if 'tmp' not in path.name] == ['1']


def test_a_save_that_the_system_cuts_short_is_one_line_and_spares_the_others(tmp_path):
    """A limit on the size of files stands for a full disk, which needs no privileges."""
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))'
    done = run(limit + '\n' + textwrap.dedent(FULL_DISK), tmp_path)
    assert_one_line_and_intact(done, tmp_path)
    assert 'File too large' in done.stdout


def test_a_full_disk_is_one_line_and_spares_the_others(tmp_path):
    mount = f'mount -t tmpfs -o size=6m none {tmp_path} && cd {tmp_path} && "$@"; code=$?; ls checkpoints; exit $code'
    prefix = ('unshare', '-rm', 'sh', '-c', mount, 'sh')
    if not shutil.which('unshare') or subprocess.run([*prefix[:2], 'true'], check=False).returncode:
        pytest.skip('no mounting without privileges here')
    done = run(FULL_DISK, tmp_path, prefix)
    assert done.returncode == 2, done.stderr
    error, *files = done.stdout.splitlines()
    assert error.startswith('error: cannot save checkpoint 2') and 'No space left' in error
    assert 'Error' not in done.stderr and 'Traceback' not in done.stderr
    assert [name for name in files if 'tmp' not in name] == ['1']


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
