"""Stopping between two steps when the system or the user asks for it."""

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While active, SIGTERM or SIGINT sets ``requested``; after the first one, a SIGINT ends the process at once.

    Of several processes, all have to stop after the same step. There JAX's own handler takes SIGTERM and lets them
    agree on one, so that signal is left alone, and SIGINT is passed on as it. Outside the main thread, where Python
    allows no handlers, signals do what they did.

    Args:
      alone: whether this is the only process.
    """

    def __init__(self, alone: bool = True) -> None:
        self.requested = False
        self._alone = alone
        self._old: dict[int, Any] = {}

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)
            self._old = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        text = f'\n{signal.Signals(number).name}: finishing the step and saving; Ctrl-C quits at once\n'
        os.write(2, text.encode())  # print() must not be entered again while it runs
        if self._alone:
            self.requested = True
        else:
            signal.raise_signal(signal.SIGTERM)
