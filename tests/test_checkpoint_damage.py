"""Checkpoints that are damaged, written wrongly or on a full disk: said, set aside, and never in place of good ones."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest

from mixcon_jax.errors import UserError
from mixcon_jax.runs import readback, saved, stored
from mixcon_jax.runs.checkpoints import Checkpoints
from mixcon_jax.runs.weights import load_params
from tests.test_checkpoints import abstract, assert_same, flip, make_state, meta, save

# ----- damage -----


def arrays_of(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob('*') if p.is_file() and p.parent.name == 'd')


def index_of(item: Path) -> Path:
    """The file that every reading of an item begins with: where its arrays lie, small ones with their values.

    How the others are laid out depends on when each part was written: the largest may be of parts that newer ones
    have replaced, which nobody reads.
    """
    (path,) = (item / 'd').iterdir()
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    'an array file flipped': lambda step: flip(index_of(step / 'model')),
    'an array file truncated': lambda step: truncate(index_of(step / 'optimizer')),
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


UNREADABLE = {
    'metadata': lambda step: step / 'meta' / 'metadata',
    'arrays': lambda step: index_of(step / 'model'),
}


def test_a_link_to_a_disk_that_is_not_mounted_is_not_damaged(tmp_path):
    folder = tmp_path / 'checkpoints'
    save(folder, [2, 4])
    (folder / '4').rename(tmp_path / 'elsewhere')
    (folder / '4').symlink_to(tmp_path / 'unmounted')
    checkpoints = Checkpoints(folder, say=lambda line: pytest.fail(line))
    with pytest.raises(UserError, match=r'4 cannot be read \(a link that leads nowhere\)'):
        checkpoints.restore(abstract(make_state(0)))
    assert sorted(os.listdir(folder)) == ['2', '4']
    checkpoints.close()


@pytest.mark.parametrize('part', UNREADABLE)
def test_what_the_system_does_not_let_read_is_not_damaged(tmp_path, part):
    """A link to itself stands for a disk that fails: opening it is refused."""
    folder = tmp_path / 'checkpoints'
    save(folder, [2, 4])
    path = UNREADABLE[part](folder / '4')
    path.rename(tmp_path / 'kept')
    path.symlink_to(path)
    checkpoints = Checkpoints(folder, say=lambda line: pytest.fail(line))
    for read in (lambda: checkpoints.restore(abstract(make_state(0))), checkpoints.load):
        with pytest.raises(UserError, match=r'4 cannot be read \(Too many levels .*stays as it is'):
            read()
    assert sorted(os.listdir(folder)) == ['2', '4']
    path.unlink()
    (tmp_path / 'kept').rename(path)
    assert_same(checkpoints.restore(abstract(make_state(0)))[0], make_state(4))
    checkpoints.close()


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
        lambda folder, step, *rest: (DAMAGE[damage](folder / str(step)), original(folder, step, *rest)),
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
                readback.verify(tmp_path / 'copy', 4, digest, threading.Event())
            except saved.Damaged:
                continue
            checkpoints = Checkpoints(tmp_path / 'copy', read_only=True)
            assert_same(checkpoints.restore(abstract(make_state(0)))[0], make_state(4))
            checkpoints.close()
            passed += 1
    assert passed > 2
    readback.verify(tmp_path / 'intact', 4, digest, threading.Event())


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


@pytest.mark.parametrize('spoilt', [False, True])
def test_an_urgent_save_does_not_wait_until_the_one_before_is_read_back(tmp_path, monkeypatch, spoilt):
    """Which is read back after it, and counts, or is set aside, then."""
    chunks, reading = stored.chunks, threading.Event()

    def endless(array):
        while True:
            reading.set()
            yield next(chunks(array))

    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=0, say=said.append)
    monkeypatch.setattr(stored, 'chunks', endless)
    checkpoints.save(make_state(2), meta(2))
    assert reading.wait(60) and checkpoints.finished() is None
    monkeypatch.setattr(stored, 'chunks', chunks)
    assert checkpoints.save(make_state(4), meta(4), urgent=True) is None
    if spoilt:
        truncate(index_of(tmp_path / '2' / 'model'))
    assert checkpoints.wait() == 4 and checkpoints.steps() == ([4] if spoilt else [2, 4])
    assert len(said) == spoilt and (not spoilt or 'checkpoint 2 cannot be read back' in said[0])
    checkpoints.close()


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
