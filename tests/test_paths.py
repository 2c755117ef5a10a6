"""``~`` means what it means in a shell, or is refused in one line, wherever a path can be given."""

import os
import pwd
from pathlib import Path

import pytest

from launch import local
from launch.sweep import sweep
from mixcon_jax import cli
from mixcon_jax import config as configs
from mixcon_jax.config import leaves
from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand, expand_folder, expand_path, foreign
from tests.tiny import ROOT

QUICKSTART = ['--config', 'experiments/quickstart.py']
TINY = [*QUICKSTART, '--workdir', 'WORKDIR', '--config.train.batch_size=8']
# No text to prepare, and a model that compiles in no time.
TASK = [
    *TINY, '--config.data.sources=synthetic:induction', '--config.data.seq_len=16', '--config.model.dim=8',
    '--config.model.pattern=mamba', '--config.model.vocab_size=64', '--config.log.tensorboard=false',
]  # fmt: skip


@pytest.fixture
def homeless(monkeypatch):
    """No HOME, and a user whom the system does not know, as in containers."""

    def unknown(_):
        raise KeyError('unknown')

    monkeypatch.delenv('HOME', raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', unknown)


@pytest.mark.parametrize(
    'path',
    ['', '.', 'a', '/a/b', './~', 'a/~', '~', '~/', '~/a', '~/a/**/*.txt', '~root/a', '~//a', '~///', '~root//a'],
)
def test_it_is_pythons_own_where_there_is_a_home(path, monkeypatch):
    monkeypatch.setenv('HOME', '/home/of/someone')
    assert Path(expand(path)) == Path(os.path.expanduser(path))
    assert expand_path(expand_path(path)) == expand_path(path)
    assert os.path.realpath(expand_path(path)) == os.path.realpath(os.path.expanduser(path))
    assert expand('gs://bucket/~/a//b') == 'gs://bucket/~/a//b'


@pytest.mark.parametrize('home', [None, ''])
def test_without_a_home_the_option_is_named(homeless, monkeypatch, home):
    if home is not None:
        monkeypatch.setenv('HOME', home)
    with pytest.raises(UserError, match=r'^data\.cache_dir=~/x: there is no home folder .* set HOME, or data\.cache'):
        expand('~/x', 'data.cache_dir')
    assert expand('/x') == '/x' and expand('~root') == Path('~root').expanduser().as_posix()


@pytest.mark.parametrize('path', ['~nobody.such', '~nobody.such/run', 'a\0b', '~\0'])
def test_what_no_path_can_be_is_refused(path):
    with pytest.raises(UserError, match=r'nobody\.such|NUL'):
        expand(path)


@pytest.mark.parametrize('text, found', [('aé·', None), ('a\udce9', b'a\xe9'), ('\ud800', b'\xed\xa0\x80')])
def test_bytes_that_are_not_utf8_are_found(text, found):
    assert foreign(text) == found
    if found:
        with pytest.raises(UserError, match='not UTF-8'):
            expand_folder(text)


DOORS = {
    'train': (cli.main, ['train', *QUICKSTART, '--workdir', 'PATH']),
    'data.cache_dir': (cli.main, ['train', *TINY, '--config.data.cache_dir=PATH']),
    'data.tokenizer': (cli.main, ['data', 'prepare', *QUICKSTART, '--config.data.tokenizer=PATH']),
    'files:': (cli.main, ['data', 'prepare', *QUICKSTART, '--config.data.sources=files:PATH']),
    'store:': (cli.main, ['data', 'prepare', *QUICKSTART, '--config.data.sources=store:PATH']),
    'eval': (cli.main, ['eval', '--workdir', 'PATH']),
    'eval FILE': (cli.main, ['eval', '--workdir', 'WORKDIR', 'PATH']),
    'data verify': (cli.main, ['data', 'verify', 'PATH']),
    'train.init_from': (cli.main, ['train', *TASK, '--config.train.init_from=PATH']),
    'generate': (cli.main, ['generate', '--workdir', 'PATH']),
    'merge': (cli.main, ['merge', '--workdir', 'PATH', '--out', 'WORKDIR']),
    'merge --out': (cli.main, ['merge', '--workdir', 'WORKDIR', '--out', 'PATH']),
    'report': (cli.main, ['report', 'PATH']),
    'report --out': (cli.main, ['report', 'WORKDIR', '--out', 'PATH']),
    'watch': (cli.main, ['watch', 'PATH']),
    'local': (local.main, ['--processes', '1', *QUICKSTART, '--workdir', 'PATH']),
    'sweep': (sweep.main, [*QUICKSTART, '--workdir', 'PATH']),
    '--config': (cli.main, ['config', '--config', 'PATH.py:argument']),
    'sweep --config': (sweep.main, ['--config', 'PATH.py', '--workdir', 'WORKDIR', '--list']),
}


@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('path, message', [('~nobody.such/x', 'there is no user nobody.such'), ('~/x', 'set HOME, or')])
def test_at_every_door(door, path, message, homeless, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    main, arguments = DOORS[door]
    replaced = [a.replace('PATH', path).replace('WORKDIR', str(tmp_path / 'run')) for a in arguments]
    if door.startswith(('data.tok', 'files', 'store')):
        replaced.append(f'--config.data.cache_dir={tmp_path / "cache"}')
    with pytest.raises(SystemExit) as end:
        main(replaced)
    line = capsys.readouterr().err
    assert end.value.code == 2
    assert line.startswith('error: ') and line.count('\n') == 1 and message in line
    assert not (tmp_path / 'run').exists()


# What doors say of nothing that do not call it empty.
NOTHING = {
    'files:': 'data.sources', 'store:': 'data.sources', '--config': 'does not exist', 'eval FILE': 'error',
    'sweep --config': 'does not exist',
}  # fmt: skip


@pytest.mark.parametrize('door', sorted(DOORS.keys() - {'train.init_from'}))  # where nothing is the default
@pytest.mark.parametrize('path', ['', ' '])
def test_nothing_is_no_path_at_any_door(door, path, tmp_path, capsys, monkeypatch):
    """A variable that is not set names no folder, nor the current one."""
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.chdir(tmp_path)
    main, arguments = DOORS[door]
    replaced = [a.replace('PATH', path).replace('WORKDIR', 'run') for a in arguments]
    replaced = [str(Path(ROOT, a)) if a == QUICKSTART[1] else a for a in replaced]
    with pytest.raises(SystemExit) as end:
        main(replaced)
    line = capsys.readouterr().err
    assert end.value.code == 2
    assert line.startswith('error: ') and line.count('\n') == 1 and NOTHING.get(door, 'empty') in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('key', [key for key, option in leaves() if option.path])
def test_an_option_that_is_a_path_says_what_to_name(key):
    config = configs.default()
    configs.validate(config)
    configs.put(config, key, '  ')
    with pytest.raises(UserError, match=f'{key}=.* is empty; name a '):
        configs.validate(config)
