"""Work in a thread of its own: its result, its errors, and that whoever waits can leave."""

import threading
import time

import pytest

from mixcon_jax.data import background
from mixcon_jax.data.background import Background, until


def test_results_and_errors_come_through():
    with Background(lambda stopped: 7) as work:
        assert work.result() == 7
    with pytest.raises(ZeroDivisionError), Background(lambda stopped: 1 // 0) as work:
        work.result()


def test_whoever_waits_hears_of_it_and_may_leave(monkeypatch):
    monkeypatch.setattr(background, 'PROGRESS_SECONDS', 0.01)
    said, ended = [], threading.Event()

    def work(stopped):
        while not stopped():
            time.sleep(0.001)
        ended.set()

    def still(seconds):
        said.append(seconds)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Background(work) as waiting:
        waiting.result(still)
    assert ended.is_set() and said == sorted(said)


def test_work_that_does_not_stop_is_left_behind(monkeypatch):
    monkeypatch.setattr(background, 'PATIENCE', 0.05)
    release = threading.Event()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Background(lambda stopped: release.wait()):
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 1
    release.set()


def test_items_end_when_it_says_so():
    stops = iter([False, False, True])
    assert list(until(lambda: next(stops), 'abc')) == ['a', 'b']
