"""Filters that keep tracebacks which libraries log off the terminal: what matters is raised, or said in one line."""

import functools
import logging
import os
import sys
from typing import Any

# A save that the disk cuts short leaves unfinished writes behind, each of which asyncio, or Python when it clears up,
# would print with a traceback of its own.
ORBAX = ('orbax', 'tensorstore')
LEFT_BEHIND = ('Event loop is closed', 'coroutine ignored GeneratorExit')


class _NoOrbax(logging.Filter):
    """Drops records that Orbax logs, or that asyncio logs about Orbax's writes."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == 'asyncio':
            return not any(word in record.getMessage() for word in ORBAX)
        return f'{os.sep}orbax{os.sep}' not in record.pathname


@functools.cache
def silence_orbax() -> None:
    """For the rest of the process, nothing of what Orbax leaves behind is logged."""
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).addFilter(_NoOrbax())
    inner = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (str(unraisable.exc_value) in LEFT_BEHIND or any(word in repr(unraisable.object) for word in ORBAX)):
            inner(unraisable)

    sys.unraisablehook = hook


# What a driver for NVIDIA's GPUs makes, the second under Windows.
DRIVERS = ('/dev/nvidiactl', '/dev/dxg')


class _OneLine(logging.Filter):
    """Puts the cause of a failure behind the message, in place of the traceback; no word where no GPU could be."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            if not any(map(os.path.exists, DRIVERS)):
                return False
            error = record.exc_info[1]
            cause = f'{type(error).__name__}: {" ".join(str(error).split())}'
            record.msg, record.args = f'{record.getMessage()}: {cause}', ()
            record.exc_info = record.exc_text = None
        return True


@functools.cache
def shorten_jax() -> None:
    """For the rest of the process, JAX says in one line why it cannot use a GPU; nothing without a driver for one."""
    logging.getLogger('jax._src.xla_bridge').addFilter(_OneLine())
