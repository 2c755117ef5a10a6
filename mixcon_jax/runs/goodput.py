"""Where a run's wall time goes: goodput."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from mixcon_jax.units import duration

# What time is spent on besides steps. Start-up ends where the loop begins; data is waiting for the next batch.
KINDS = ('startup', 'compile', 'data', 'checkpoint', 'evaluation')


class Clock:
    """Splits wall time into kinds; what no ``spend`` claims belongs to steps."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = now()
        self._open: list[float] = []  # of each spend in progress: seconds that spends inside it have claimed
        self.seconds = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Counts the block's time, less that of blocks inside it, as ``kind``."""
        start = self._now()
        self._open.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - start
            self.seconds[kind] += elapsed - self._open.pop()
            if self._open:
                self._open[-1] += elapsed

    def total(self) -> float:
        """Seconds since the clock was made."""
        return self._now() - self._start

    def training(self) -> float:
        """Seconds spent on steps and on waiting for their data: what tokens per second are measured against."""
        return self.total() - sum(self.seconds.values()) + self.seconds['data']

    def shares(self) -> dict[str, float]:
        """The share of wall time in steps (``goodput``) and in everything else; they add up to one."""
        total = max(self.total(), 1e-9)
        spent = {kind: seconds / total for kind, seconds in self.seconds.items()}
        return {'goodput': max(0.0, 1.0 - sum(spent.values()))} | spent

    def spent(self) -> dict[str, Any]:
        """Seconds and shares as a record holds them."""
        return {'seconds': round(self.total(), 1)} | {key: round(share, 4) for key, share in self.shares().items()}

    def describe(self) -> str:
        """The same in a line, without what took next to nothing."""
        shares = self.shares()
        parts = [f'steps {100 * shares.pop("goodput"):.0f} %']
        parts += [f'{kind} {100 * share:.0f} %' for kind, share in shares.items() if share >= 0.005]
        return f'time {duration(self.total())}: {", ".join(parts)}'
