"""Work in native code that cannot be interrupted, in a thread of its own, so that Ctrl-C is heard and progress seen."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

PROGRESS_SECONDS = 2.0
PATIENCE = 1.5  # seconds that an interrupted caller waits for the thread: ending a process under it is rough


class Background[T]:
    """``work`` in a thread that does not keep the process alive; leaving the context with an error asks it to stop.

    Args:
      work: Called with a function that says whether it should stop; it asks as often as it can.
    """

    def __init__(self, work: Callable[[Callable[[], bool]], T]) -> None:
        self._stop, self._done = threading.Event(), threading.Event()
        self._result: list[T] = []
        self._error: list[BaseException] = []

        def target() -> None:
            try:
                self._result.append(work(self._stop.is_set))
            except BaseException as error:
                self._error.append(error)
            finally:
                self._done.set()

        threading.Thread(target=target, daemon=True).start()

    def __enter__(self) -> 'Background[T]':
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._stop.set()
            self._done.wait(PATIENCE)

    def result(self, still: Callable[[float], None] = lambda seconds: None) -> T:
        """What the work returned, once it has; meanwhile ``still`` is called with the seconds waited so far."""
        begin = time.monotonic()
        while not self._done.wait(PROGRESS_SECONDS):
            still(time.monotonic() - begin)
        if self._error:
            raise self._error[0]
        return self._result[0]


def until[T](stopped: Callable[[], bool], items: Iterable[T]) -> Iterator[T]:
    """The items, up to when ``stopped`` says so."""
    for item in items:
        if stopped():
            return
        yield item
