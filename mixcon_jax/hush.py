"""Keeps Orbax's own words about failures off the terminal: whatever matters is raised too, and said in one line."""

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
def hush_orbax() -> None:
    """Takes effect for the rest of the process."""
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).addFilter(_NoOrbax())
    inner = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (str(unraisable.exc_value) in LEFT_BEHIND or any(word in repr(unraisable.object) for word in ORBAX)):
            inner(unraisable)

    sys.unraisablehook = hook
