"""Ends a process that stays at work of its own for too long: others wait for it, and nothing else would notice.

Of several processes, one that has died or is stopped is missed by the others. One that goes on running but gets nowhere
in Python, as in an endless loop or a read from a disk that has gone, is not. It cannot be told by its silence, for
others are as silent while they wait for it; but it is at work of its own, and they are not. So ``watch`` bounds every
stretch that the main thread says is its ``own``, and what waits for others, or takes as long as it takes on all of them
(compiling, saving), has no bound.

A thread looks every second. Where it cannot, because the main thread holds Python's lock, a timer outside of Python
that it would have set back ends the process.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

PULSE = 1.0  # seconds between two looks
SPARE = 5.0  # seconds after which the timer takes the thread's place

_begun: float | None = None  # when the stretch began that the main thread is in; None outside of one


@contextlib.contextmanager
def own() -> Iterator[None]:
    """The main thread does work of its own, and waits for nobody."""
    global _begun
    before, _begun = _begun, time.monotonic()
    try:
        yield
    finally:
        _begun = before


def each[T](items: Iterable[T]) -> Iterator[T]:
    """The items, each of which is made in a stretch of ``own``."""
    iterator = iter(items)
    while True:
        with own():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def watch(patience: float, name: Callable[[], str], code: int, pulse: Callable[[], object] | None = None) -> None:
    """From now on ends the process when a stretch of ``own`` takes too long, saying what the main thread is at.

    Args:
      patience: seconds that a stretch may take.
      name: says what the process is called.
      code: its exit code then; where Python is held it is 1.
      pulse: called every second, too; once it raises OSError the process is not watched any more.
    """
    main = threading.main_thread().ident or 0

    def look() -> None:
        while True:
            try:
                if pulse:
                    pulse()
            except OSError:
                faulthandler.cancel_dump_traceback_later()
                return
            begun = _begun
            if begun is not None and time.monotonic() - begun > patience:
                frames = traceback.format_stack(sys._current_frames().get(main))
                sys.stderr.write(f'{"".join(frames)}error: {name()} was stuck here for {patience:g} s\n')
                sys.stderr.flush()
                os._exit(code)
            faulthandler.dump_traceback_later(patience + SPARE, exit=True)
            time.sleep(PULSE)

    threading.Thread(target=look, daemon=True).start()
