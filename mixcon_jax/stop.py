"""Stopping between two steps when the system or the user asks for it."""

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While active, SIGTERM or SIGINT sets ``requested``; after the first one, a SIGINT ends the process at once.

    Outside the main thread, where Python allows no handlers, it never stops anything.
    """

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        text = f'\n{signal.Signals(number).name}: finishing the step and saving; Ctrl-C quits at once\n'
        os.write(2, text.encode())  # print() must not be entered again while it runs
