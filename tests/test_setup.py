"""Set-up: what `make` does on machines that suit it, and the one sentence it says on those that do not.

The script is run in a copy of the repository's set-up files. Its Python is a stub that makes a .venv with a stub in it,
so that nothing is installed; the slow test at the end uses the real one against an index that nobody serves.
"""

import configparser
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXTRAS = ('gpu', 'plan', 'wandb', 'huggingface', 'lm-eval', 'docs')

# What `python` and `.venv/bin/python` do: answer the version check, copy themselves into a .venv, and as pip append
# their arguments to the file pip-calls, then do what the variable PIP_DOES says.
STUB = """#!/bin/sh
case "$*" in
    --version) echo Python 3.12.1 ;;
    -c*) exit 0 ;;
    '-m venv .venv') mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    '-m pip'*) echo "$*" >>pip-calls; eval "${PIP_DOES:-true}" ;;
esac
"""
OLD = """#!/bin/sh
case "$*" in --version) echo Python 3.9.1 ;; *) exit 1 ;; esac
"""


@pytest.fixture
def clone(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with the set-up files and a folder `bin` that holds the stub as python3 and what the script calls."""
    for name in ('setup.cfg', 'pyproject.toml', 'Makefile', *(path.name for path in ROOT.glob('requirements*.lock'))):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / 'launch', tmp_path / 'launch', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'bin').mkdir()
    for tool in (
        'bash',
        'sh',
        'cat',
        'cp',
        'cut',
        'dirname',
        'flock',
        'grep',
        'mkdir',
        'rm',
        'sha256sum',
        'sleep',
        'touch',
    ):
        if found := shutil.which(tool):
            (tmp_path / 'bin' / tool).symlink_to(found)
    executable(tmp_path / 'bin' / 'python3', STUB)
    return tmp_path


def executable(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def environment(clone: pathlib.Path, **variables: str) -> dict[str, str]:
    return {'PATH': str(clone / 'bin'), 'HOME': str(clone), 'PYENV_ROOT': str(clone), **variables}


def bootstrap(clone: pathlib.Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ['bash', 'launch/bootstrap.sh', *arguments]
    return subprocess.run(
        command,
        cwd=clone,
        env=environment(clone, **variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def pip_calls(clone: pathlib.Path) -> list[str]:
    path = clone / 'pip-calls'
    return path.read_text().splitlines() if path.exists() else []


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The run's only complaint: one line, `error: ...`, and a non-zero exit."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(('Making', 'Updating', 'Waiting'))]
    assert result.returncode != 0
    assert len(lines) == 1 and lines[0].startswith('error: '), result.stderr
    return lines[0]


def test_installs_the_lock_with_hashes_once(clone):
    assert bootstrap(clone).returncode == 0
    locked, own = pip_calls(clone)
    assert '--require-hashes -r requirements.lock' in locked
    assert '--no-deps --no-build-isolation --editable .' in own
    assert bootstrap(clone).stderr == '' and len(pip_calls(clone)) == 2


def test_a_changed_lock_is_installed_anew(clone):
    bootstrap(clone)
    with (clone / 'requirements.lock').open('a') as lock:
        lock.write('# changed\n')
    assert bootstrap(clone).returncode == 0 and len(pip_calls(clone)) == 4


def test_a_moved_folder_is_set_up_anew(clone, tmp_path_factory):
    """The scripts of a virtual environment hold its path."""
    bootstrap(clone)
    moved = tmp_path_factory.mktemp('moved') / 'clone'
    shutil.copytree(clone, moved, symlinks=True)
    assert bootstrap(moved).returncode == 0 and len(pip_calls(moved)) == 4


@pytest.mark.parametrize('extra', EXTRAS)
def test_extras_are_added_once_and_leave_the_rest(clone, extra):
    bootstrap(clone)
    for _ in range(2):
        assert bootstrap(clone, extra).returncode == 0
    assert len(pip_calls(clone)) == 3 and f'-r requirements-{extra}.lock' in pip_calls(clone)[2]
    assert bootstrap(clone).stderr == ''


def test_unknown_extra(clone):
    assert "no extra 'gpus'" in one_error(bootstrap(clone, 'gpus'))
    assert not (clone / '.venv').exists()


@pytest.mark.parametrize('python', ['old', 'none'])
def test_unsuitable_python(clone, python):
    (clone / 'bin' / 'python3').unlink()
    for name in ('python3', 'python3.12', 'python') if python == 'old' else ():
        executable(clone / 'bin' / name, OLD)
    if os.access('/usr/bin/python3', os.X_OK):  # the last place that is looked at
        suitable = subprocess.run(
            ['/usr/bin/python3', '-c', 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))']
        )
        if suitable.returncode == 0:
            pytest.skip('this machine has a suitable /usr/bin/python3')
    message = one_error(bootstrap(clone))
    assert 'Python 3.12 or newer' in message and ('Python 3.9.1' if python == 'old' else 'no python3') in message
    assert not (clone / '.venv').exists()


def test_unsuitable_named_python(clone):
    executable(clone / 'old', OLD)
    assert 'PYTHON=./old is not a Python 3.12' in one_error(bootstrap(clone, PYTHON='./old'))


@pytest.mark.parametrize(
    'words, meaning',
    [
        ('Failed to establish a new connection: Connection refused', 'is there a network'),
        ('Temporary failure in name resolution', 'is there a network'),
        ('THESE PACKAGES DO NOT MATCH THE HASHES', 'could not be installed'),
    ],
)
def test_failed_install_is_one_sentence_and_is_not_done(clone, words, meaning):
    assert meaning in one_error(bootstrap(clone, PIP_DOES=f'echo "{words}"; exit 1'))
    assert words in (clone / '.cache' / 'setup.log').read_text()
    assert not (clone / '.venv' / '.ready').exists()
    (clone / '.venv' / 'left-over').touch()
    assert bootstrap(clone).returncode == 0
    assert (clone / '.venv' / '.ready').exists() and not (clone / '.venv' / 'left-over').exists()


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize('step', ['requirements.lock', 'editable'])
def test_interrupted_set_up_starts_anew(clone, sig, step):
    process = subprocess.Popen(
        ['bash', 'launch/bootstrap.sh'],
        cwd=clone,
        env=environment(clone, PIP_DOES=f'case "$*" in *{step}*) sleep 30 ;; esac'),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not any(step in call for call in pip_calls(clone)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, sig)
    assert process.wait(timeout=60) != 0
    assert not (clone / '.venv' / '.ready').exists()
    (clone / '.venv' / 'left-over').touch()
    assert bootstrap(clone).returncode == 0
    assert (clone / '.venv' / '.ready').exists() and not (clone / '.venv' / 'left-over').exists()


def test_two_at_once_install_once(clone):
    command = ['bash', 'launch/bootstrap.sh']
    variables = environment(clone, PIP_DOES='sleep 0.3')
    both = [subprocess.Popen(command, cwd=clone, env=variables, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(pip_calls(clone)) == 2


def locked(path: pathlib.Path) -> dict[str, str]:
    """Name and version of each package in a lock file; every one must have a hash."""
    entries = re.findall(r'^([\w.\[\]-]+)==([^\s;\\]+)((?:.*\\\n)(?:.*\n)*?)(?=^\S|\Z)', path.read_text(), re.MULTILINE)
    assert entries and all('--hash=sha256:' in rest for _, _, rest in entries)
    return {name.lower().replace('_', '-'): version for name, version, _ in entries}


def test_locks_hold_every_dependency_and_agree():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    extras = dict(config['options.extras_require'])
    assert set(extras) == {'dev', *EXTRAS}
    base = config['options']['install_requires']
    locks = {extra: locked(ROOT / f'requirements-{extra}.lock') for extra in EXTRAS}
    locks['dev'] = locked(ROOT / 'requirements.lock')
    for extra, lock in locks.items():
        for line in (base + '\n' + extras[extra]).split():
            name = re.split(r'[<>=\[]', line)[0].lower().replace('_', '-')
            assert name in lock, f'{name} is not in the lock of {extra}: run `make lock`'
        differing = {name for name in lock.keys() & locks['dev'].keys() if lock[name] != locks['dev'][name]}
        assert not differing, f'{extra} and dev lock different versions of {differing}'


def test_running_versions_are_the_locked_ones():
    """The tests speak for the lock only if they run on it."""
    from importlib import metadata

    for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'tensorstore', 'tokenizers'):
        assert metadata.version(name) == locked(ROOT / 'requirements.lock')[name], name


def test_python_is_new_enough_everywhere():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    assert config['options']['python_requires'] == '>=3.12'
    assert (ROOT / '.python-version').read_text().strip() == '3.12'


@pytest.mark.slow
def test_no_network_for_real(clone):
    """Real Python and pip, and an index on a port where nobody listens."""
    for name in ('setup.cfg', 'pyproject.toml'):
        assert (clone / name).exists()
    variables = {
        'PATH': os.environ['PATH'],
        'PYTHON': sys.executable,
        'PIP_CONFIG_FILE': os.devnull,
        'PIP_INDEX_URL': 'http://127.0.0.1:9/simple',
        'PIP_FIND_LINKS': '',
        'PIP_RETRIES': '0',
        'PIP_NO_CACHE_DIR': '1',
    }
    assert 'is there a network' in one_error(bootstrap(clone, **variables))
    assert not (clone / '.venv' / '.ready').exists()
