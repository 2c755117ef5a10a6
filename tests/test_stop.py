"""Signals that stop a run, and those that must not."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest

from mixcon_jax.errors import Exit
from mixcon_jax.host.signals import STOPPING, StopRequest
from mixcon_jax.runs.records import last, read
from tests.tiny import ROOT, tiny_config, write_experiment


@pytest.mark.parametrize('number', STOPPING)
def test_every_signal_of_a_closing_session_or_scheduler_asks_to_stop(number):
    before = {each: signal.getsignal(each) for each in STOPPING}
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert {each: signal.getsignal(each) for each in STOPPING} == before


def test_several_processes_stop_where_they_agree_to():
    """Each asks with the count of its questions, until it is told yes; then they need not ask."""
    asked = []
    stop = StopRequest(lambda count: asked.append(count) or count == 3)
    assert [stop.due() for _ in range(5)] == [False, False, True, True, True] and asked == [1, 2, 3]


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_does_not_keep_it_from_stopping(monkeypatch):
    def gone(*_):
        raise OSError('Input/output error')

    monkeypatch.setattr(os, 'write', gone)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested


def test_a_terminal_that_closes_loses_nothing(tmp_path):
    """A real one: the system sends SIGHUP, and whatever is printed from then on fails."""
    config = tiny_config(tmp_path, model__pattern=('attention+mlp',), train__steps=100_000, checkpoint__every=90_000)
    config.eval.every = 0
    command = [sys.executable, '-m', 'mixcon_jax.cli', 'train', f'--workdir={tmp_path / "run"}']
    command.append(f'--config={write_experiment(tmp_path / "experiment.py", config)}')
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    try:
        os.set_blocking(ours, False)
        deadline = time.monotonic() + 120
        while not any(record['step'] > 20 for record in read(tmp_path / 'run' / 'metrics.jsonl')):
            assert process.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 1 << 16)
            time.sleep(0.05)
        os.close(ours)
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.wait()
    stopped = last(read(tmp_path / 'run' / 'metrics.jsonl'), kind='run')
    assert stopped['event'] == 'stopped'
    assert (tmp_path / 'run' / 'checkpoints' / str(stopped['step'])).is_dir()


ENDING = """
import os, time
from mixcon_jax.host.signals import end_with
end_with({})
print('up', flush=True)
time.sleep(99)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a child')
def test_a_child_ends_with_its_parent_however_that_dies():
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {ENDING.format("os.getppid()")!r}])'
    began = time.monotonic()
    with subprocess.Popen([sys.executable, '-c', parent], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b'up\n'
        process.kill()
        assert process.stdout.read() == b''  # the child had it open
    assert time.monotonic() - began < 60
    late = subprocess.run([sys.executable, '-c', ENDING.format(0)], cwd=ROOT, stdout=subprocess.PIPE)
    assert (late.returncode, late.stdout) == (Exit.STOPPED, b'')
