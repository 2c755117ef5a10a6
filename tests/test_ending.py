"""However a command fails, it says so in one line and a known exit code; a fault of ours keeps its traceback."""

import errno
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest
from jax._src.config import bool_env

from launch import local
from launch.sweep import sweep
from mixcon_jax import cli
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host import ambient, ending
from mixcon_jax.host.log_filters import DRIVERS
from mixcon_jax.host.output import OutputLost
from tests.tiny import ROOT

EXPERIMENT = 'experiments/quickstart.py'
# The function that does each command's work, its program, its arguments.
COMMANDS = {
    'train': ('mixcon_jax.train.train', cli.main, ['train', '--config', EXPERIMENT, '--workdir', 'run']),
    'eval': ('mixcon_jax.evaluate.evaluate', cli.main, ['eval', '--workdir', 'run']),
    'analyze': (
        'mixcon_jax.analyses.effective_dimension.analyze',
        cli.main,
        ['analyze', 'effective-dimension', '--workdir', 'run'],
    ),
    'generate': ('mixcon_jax.inference.generate.generate_text', cli.main, ['generate', '--workdir', 'run']),
    'config': ('mixcon_jax.config.load', cli.main, ['config', '--config', EXPERIMENT]),
    'report': ('mixcon_jax.reports.report.report', cli.main, ['report', 'run']),
    'watch': ('mixcon_jax.watching.watch.watch', cli.main, ['watch', 'run']),
    'doctor': ('mixcon_jax.doctor.doctor', cli.main, ['doctor']),
    'prepare': ('mixcon_jax.data.prepare.prepare', cli.main, ['data', 'prepare', '--config', EXPERIMENT]),
    'verify': ('mixcon_jax.data.integrity.verify_all', cli.main, ['data', 'verify', 'run']),
    'local': ('launch.local.load', local.main, ['--processes', '1', '--config', EXPERIMENT, '--workdir', 'run']),
    'sweep': ('launch.sweep.sweep.cases', sweep.main, ['--config', EXPERIMENT, '--workdir', 'run']),
}
NO_BACKEND = "Unable to initialize backend 'cuda': it is not here (set JAX_PLATFORMS='' to choose another)"
# What is raised, the exit code, what the line says.
FAILURES = [
    (UserError('the reason'), 2, 'error: the reason'),
    (UserError('no file a\nb\x1b[2J'), 2, r'error: no file a\nb\x1b[2J'),
    (MemoryError(), 2, 'error: there is not enough memory; take a smaller batch'),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore'), 2, 'memory (Out of'),
    (
        jax.errors.JaxRuntimeError('INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes.'),
        2,
        'not enough memory (Error dispatching computation: Out of memory allocating 9 bytes.); take a smaller',
    ),
    (OSError(errno.ENOMEM, 'Cannot allocate memory'), 2, 'there is not enough memory'),
    (PermissionError(errno.EACCES, 'Permission denied', '/some/file'), 2, 'error: /some/file: Permission denied'),
    (OSError(errno.ENOSPC, 'No space left on device'), 2, 'error: No space left on device'),
    (ValueError('RESOURCE_EXHAUSTED: "/a" [OS error 28: No space left on device]'), 2, '"/a" [OS error 28: No space'),
    (ValueError('RESOURCE_EXHAUSTED: "/a": Over [os_error_code=\'122\']'), 2, 'error: RESOURCE_EXHAUSTED: "/a": Over'),
    (ValueError('FAILED: "/a": Too large [os_error_code=\'27\']'), 2, 'error: FAILED: "/a": Too large'),
    (RuntimeError(NO_BACKEND), 2, 'it is not here; '),
    (ValueError("invalid truth value 'x' for environment 'JAX_NO'"), 2, 'error: JAX cannot read JAX_NO='),
    (
        jax.errors.JaxRuntimeError('UNKNOWN: Gloo AllReduce failed: closed'),
        1,
        'error: another process of this run cannot',
    ),
    (KeyboardInterrupt(), 130, 'interrupted'),
    (KeyError('a key'), 70, "this is a fault of MixCon: KeyError: 'a key'; please report it, with its traceback in /"),
    (AssertionError(), 70, 'this is a fault of MixCon: AssertionError; '),
    (RecursionError('deep\ndown'), 70, 'RecursionError: deep down'),
    (BrokenPipeError(errno.EPIPE, 'Broken pipe'), 70, 'BrokenPipeError'),
    (ValueError('\udce9'), 70, 'ValueError'),
]


@pytest.mark.parametrize('error, code, line', FAILURES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize('command', COMMANDS)
def test_every_failure_of_every_command_is_one_line(command, error, code, line, monkeypatch, tmp_path, capsys):
    work, main, arguments = COMMANDS[command]
    arguments = [str(tmp_path / 'run') if argument == 'run' else argument for argument in arguments]
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')

    def fail(*_, **__):
        raise error

    module, _, name = work.rpartition('.')
    monkeypatch.setattr(importlib.import_module(module), name, fail)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr().err
    assert end.value.code == code
    assert printed.count('\n') == 1 and line in printed
    kept = list(tmp_path.glob('mixcon-fault-*'))
    assert len(kept) == (code == 70)
    if kept:
        assert str(kept[0]) in printed
        assert 'in fail\n    raise error\n' in kept[0].read_text()


def test_a_fault_is_shown_whole_where_its_traceback_cannot_be_kept(monkeypatch, capsys):
    def refuse(**_):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(tempfile, 'mkstemp', refuse)
    assert ending.failed(KeyError('x')) == 70
    assert capsys.readouterr().err.startswith("KeyError: 'x'\nerror: this is a fault of MixCon: KeyError: 'x'; ")


@pytest.mark.parametrize('number, said', [(errno.EPIPE, ''), (errno.ENOSPC, 'No space left on device')])
def test_lost_output_ends_a_command_that_only_shows_something(number, said, capsys):
    error = OutputLost(os.strerror(number))
    error.__cause__ = OSError(number, os.strerror(number))
    assert ending.failed(error) == 1
    printed = capsys.readouterr().err
    assert said in printed and printed.count('\n') == bool(said)


# ---------------------------------------------------------------------------------------------------------------------
# What the environment asks of JAX
# ---------------------------------------------------------------------------------------------------------------------
def test_settings_that_would_change_numbers_are_left_out_and_named(monkeypatch):
    for name, harmless in ambient.LEFT_OUT.items():
        for value in (*harmless, 'other'):
            monkeypatch.setenv(name, value)
            lines = list(ambient.leave_out())
            assert name not in os.environ
            assert [line.startswith(f'{name}=other is left out') for line in lines] == [True] * (value == 'other')


def test_settings_that_may_be_left_out_are_jaxs_own():
    """A name that JAX does not know would be left out in vain."""
    known = {f'JAX_{name.removeprefix("jax_")}'.upper() for name in jax.config.values}
    assert set(ambient.LEFT_OUT) <= known


def test_what_jax_cannot_read_is_named(monkeypatch):
    monkeypatch.setenv('JAX_SOMETHING', 'maybe')
    with pytest.raises(ValueError) as error:
        bool_env('JAX_SOMETHING', False)
    assert 'JAX cannot read JAX_SOMETHING=maybe' in ambient.complaint(error.value)
    assert ambient.complaint(ValueError('of something else')) is None


@pytest.mark.skipif(any(map(os.path.exists, DRIVERS)), reason='there is a GPU')
@pytest.mark.parametrize('platform', ['cuda', pytest.param('nosuch', marks=pytest.mark.slow)])
def test_a_platform_that_is_not_here_is_one_line(platform, tmp_path):
    """With a setting beside it that JAX could not even read."""
    settings = os.environ | {'JAX_PLATFORMS': platform, 'JAX_ENABLE_X64': 'maybe', 'PYTHONPATH': str(ROOT)}
    options = ['--config.data.sources=synthetic:induction', '--config.data.seq_len=16', f'--workdir={tmp_path}']
    experiment = str(ROOT / 'experiments' / 'quickstart.py')
    command = [sys.executable, '-m', 'mixcon_jax.cli', 'train', '--config', experiment, *options]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    note, line = done.stderr.splitlines()
    assert note.startswith('note: JAX_ENABLE_X64=maybe is left out')
    assert line.startswith(f'error: JAX_PLATFORMS={platform} cannot be used here: ') and 'JAX_PLATFORMS=cpu' in line
    assert done.returncode == 2


def test_the_exit_codes_stand_in_the_docs():
    page = Path(ROOT, 'docs', 'run-directory.md').read_text(encoding='utf-8')
    assert set(Exit) == {0, 1, 2, 3, 70, 75, 130}
    assert set(Exit) == {int(code) for code in re.findall(r'^\| (\d+) \| ', page, re.MULTILINE)}
