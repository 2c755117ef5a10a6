"""What a command prints: neither a terminal that cannot show it nor one that has gone ends what is at work."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

STREAMS = (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w'))  # by file descriptor


class OutputLost(BaseException):
    """Standard output cannot be written: its reader has gone, or its disk is full.

    As an interruption, it passes by whoever handles every kind of error.
    """


class Output:
    """A stream whose failures raise ``OutputLost`` or, once it ``goes_on``, nothing: what is written is lost then.

    Characters that it cannot show become question marks. Everything else is the stream's own.
    """

    def __init__(self, stream: Any, goes_on: bool) -> None:
        self._stream, self.goes_on = stream, goes_on
        self._lost: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='replace')

    def write(self, text: str) -> int:
        with self._guarded():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            first = self._lost is None
            self._lost = error
            with contextlib.suppress(OSError, ValueError):  # what still waits to be written goes nowhere
                _point_nowhere(self._stream.fileno())
            if not self.goes_on:
                raise OutputLost(error.strerror) from error
            if first and self._stream is not sys.stderr and sys.stdout is self:
                print(f'note: the output is lost ({error.strerror}); the command goes on', file=sys.stderr)


def lasting(stream: Any) -> Any:
    """The stream as one whose end ends nothing that writes to it; a guarded one as it is."""
    return stream if isinstance(stream, Output) else Output(stream, goes_on=True)


class LiveLine:
    """Lines that stay and, on a terminal, one below them that is written over.

    Attributes:
      on_terminal: whether there is one.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self.on_terminal = lasting(stream), stream.isatty()
        self._live = ''

    def say(self, text: str) -> None:
        """Writes lines that stay."""
        self._write(f'\r{" " * len(self._live)}\r{text}\n' if self._live else f'{text}\n')
        self._live = ''

    def live(self, text: str) -> None:
        """Replaces the live line; elsewhere than on a terminal nothing is written."""
        if self.on_terminal and text != self._live:
            self._write(f'\r{text.ljust(len(self._live))}')
            self._live = text

    def end(self) -> None:
        """Leaves the live line where it is, so that what others write begins below it."""
        if self._live:
            self._write('\n')
            self._live = ''

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def keep_libraries_out() -> None:
    """From now on standard output is Python's alone; what libraries print past it goes to standard error.

    Gloo, by which processes on CPUs exchange, tells there how many it has met, in the midst of what a command prints.
    """
    with contextlib.suppress(OSError):  # one that is closed
        sys.stdout.flush()
        own = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = open(own, 'w', encoding=sys.stdout.encoding, buffering=1)  # noqa: SIM115 (as long as the program)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Standard output and error are guarded meanwhile; those that are closed are there, and show nothing."""
    for descriptor, (name, mode) in enumerate(STREAMS):
        _open_if_closed(descriptor, name, mode)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(sys.stdout, goes_on=False), Output(sys.stderr, goes_on=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OutputLost):
                stream.flush()
        sys.stdout, sys.stderr = before


def go_on() -> None:
    """From now on the command is worth more than its output: a reader that goes away does not end it."""
    if isinstance(sys.stdout, Output):
        sys.stdout.goes_on = True


def use_utf8() -> None:
    """Starts this program anew, in Python's UTF-8 mode, where the locale has another encoding than UTF-8.

    Else Python and the libraries that write token stores and checkpoints would take one name for two.
    """
    if sys.getfilesystemencoding() != 'utf-8' and os.environ.get('PYTHONUTF8') != '1':
        os.environ['PYTHONUTF8'] = '1'  # for the processes that it starts, too
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_if_closed(descriptor: int, name: str, mode: str) -> None:
    """Else the next file that is opened would be taken for the stream, and written over by what is printed."""
    try:
        os.fstat(descriptor)
    except OSError:
        _point_nowhere(descriptor)
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, mode, encoding='utf-8'))  # noqa: SIM115 (open as long as the program)


def _point_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
