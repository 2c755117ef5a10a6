"""Signals that stop a run, and those that must not."""

import os
import signal

import pytest

from mixcon_jax.stop import STOPPING, StopRequest


@pytest.mark.parametrize('number', STOPPING)
def test_every_signal_of_a_closing_session_or_scheduler_asks_to_stop(number):
    before = {each: signal.getsignal(each) for each in STOPPING}
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert {each: signal.getsignal(each) for each in STOPPING} == before


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
