"""Signals: stopping between two steps when the system or the user asks for it, and ending with the parent."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from mixcon_jax.errors import Exit

# What asks a process to stop: also a terminal that closes, and schedulers that warn by SIGUSR1.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Handler:
    """While active, some signals call ``handle``; afterwards they do what they did.

    SIGHUP stays ignored where it is, as ``nohup`` wants it.

    Outside the main thread, where Python allows no handlers, they always do.

    Args:
      signals: their numbers.
    """

    def __init__(self, signals: Iterable[int] = STOPPING) -> None:
        self._signals = tuple(signals)
        self._old: dict[int, Any] = {}

    def __enter__[H: 'Handler'](self: H) -> H:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.handle(number)

    def handle(self, number: int) -> None:
        """Called between two instructions of whatever the main thread does."""
        raise NotImplementedError


class StopRequest(Handler):
    """While active, a signal of STOPPING sets ``requested``; after the first one, a SIGINT ends the process at once.

    Of several processes, all have to stop at the same place. There JAX's own handler takes SIGTERM and lets them agree
    on one, so that signal is left alone, and the others are passed on as it.

    Args:
      agree: of several processes, ``processes.told_to_stop``; None for one alone.
    """

    def __init__(self, agree: Callable[[int], bool] | None = None) -> None:
        super().__init__(number for number in STOPPING if agree is None or number != signal.SIGTERM)
        self.requested = False
        self._agree, self._asked = agree, 0

    def due(self) -> bool:
        """Whether to stop here. Several processes have to ask as often as each other: then all are told the same."""
        if self._agree is not None and not self.requested:
            self._asked += 1
            self.requested = self._agree(self._asked)
        return self.requested

    def handle(self, number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        text = f'\n{signal.Signals(number).name}: finishing the step and saving; Ctrl-C quits at once\n'
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, text.encode())  # print() must not be entered again while it runs
        if self._agree is None:
            self.requested = True
        else:
            signal.raise_signal(signal.SIGTERM)


def end_with(parent: int) -> None:
    """On Linux, SIGTERM comes when the parent dies, however it dies; where it has died already, this exits.

    Args:
      parent: its process id. The thread of it that started this process must live as long. A process that
        ignores SIGTERM lives on.
    """
    if sys.platform == 'linux':
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(Exit.STOPPED)
