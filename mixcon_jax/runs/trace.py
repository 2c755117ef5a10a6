"""A profiler's trace of some steps of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mixcon_jax.runs import mark


class Trace:
    """Traces the steps that ``log.profile_start`` and ``log.profile_steps`` name; without them it does nothing.

    A trace that cannot be written is said and ends nothing: the run is worth more.

    Args:
      log: ``config.log``.
      folder: where it goes, made when it begins.
      say: takes a line.

    Raises:
      UserError: a trace is wanted, but there is something else in the folder's place.
    """

    def __init__(self, log: ml_collections.ConfigDict, folder: Path, say: Callable[[str], None]) -> None:
        self._first, self._last = log.profile_start, log.profile_start + log.profile_steps - 1
        self._folder, self._say, self._running = folder, say, False
        if self._first:
            mark.require_place(folder)

    def begins_after(self, step: int) -> bool:
        """Whether the step after this one is the first that it covers."""
        return step + 1 == self._first

    def ends_after(self, step: int) -> bool:
        """Whether this step is the last that it covers."""
        return self._first > 0 and step == self._last

    def begin(self) -> None:
        self._running = self._tried(jax.profiler.start_trace, str(self._folder))

    def end(self) -> None:
        """Writes the trace, if one is open: however the run ends."""
        if self._running:
            self._running = False
            if self._tried(jax.profiler.stop_trace):
                self._say(f'profile in {self._folder}')

    def _tried(self, act: Callable[..., Any], *args: Any) -> bool:
        """Whether it went well; else a line says why not."""
        try:
            act(*args)
        except Exception as error:  # of the disk or of the profiler, whose types are many
            words = ' '.join(str(error).split())[:200]
            self._say(f'no profile in {self._folder}: {type(error).__name__}: {words}')
            return False
        return True
