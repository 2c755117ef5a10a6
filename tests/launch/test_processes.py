"""Processes that launchers start: their share of the machine, and the signals that reach them."""

import os
import signal
import subprocess

import pytest

from launch import processes
from launch.processes import Share, Signals
from mixcon_jax.errors import UserError


def test_signals_are_noted_and_only_a_second_ctrl_c_kills():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        for number, expected in ((signal.SIGTERM, (True, False)), (signal.SIGTERM, (True, False))):
            signal.raise_signal(number)
            assert (signals.stop, signals.kill) == expected
        signal.raise_signal(signal.SIGINT)
        assert signals.kill
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_cores_and_gpus_are_shared_out_equally(monkeypatch):
    monkeypatch.setattr(processes, '_cores', lambda: (0, 1, 4, 5, 6))
    shares = processes.shares(2, '--jobs', {'CUDA_VISIBLE_DEVICES': '3,5,7,-1,9'})
    assert shares == [Share((0, 1), ('3',)), Share((4, 5), ('5',))]
    assert processes.shares(1, '--jobs', {'CUDA_VISIBLE_DEVICES': '3'}) == [Share()]
    assert processes.shares(3, '--jobs', {'CUDA_VISIBLE_DEVICES': ''})[2] == Share((4,))
    assert processes.shares(3, '--jobs', {'CUDA_VISIBLE_DEVICES': '1', 'JAX_PLATFORMS': 'cpu'})[0].gpus is None
    assert processes.shares(4, '--processes', {'JAX_PLATFORMS': 'cpu'}, overlap=True) == [Share()] * 4
    with pytest.raises(UserError, match='--jobs 2 needs as many GPUs, but 1 is visible'):
        processes.shares(2, '--jobs', {'CUDA_VISIBLE_DEVICES': '4', 'JAX_PLATFORMS': 'cuda,cpu'})


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='this system pins no process')
def test_a_child_has_its_share_and_a_session_of_its_own():
    before = os.sched_getaffinity(0)
    core = max(before)
    show = 'print(sorted(os.sched_getaffinity(0)), os.environ["CUDA_VISIBLE_DEVICES"], os.getsid(0) == os.getpid())'
    share = Share((core,), ('2', '3'))
    child = processes.start('timeit', ['-n1', '-r1', '-s', 'import os', show], share, os.environ, subprocess.PIPE)
    assert child.communicate()[0].decode().splitlines()[0] == f'[{core}] 2,3 True'
    assert os.sched_getaffinity(0) == before
