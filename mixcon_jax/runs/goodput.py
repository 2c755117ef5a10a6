"""Where a run's wall time goes, and how fast its devices could be: goodput and MFU."""

import contextlib
import time
from collections.abc import Callable, Iterator

# What time is spent on besides steps. Start-up ends where the loop begins; data is waiting for the next batch.
KINDS = ('startup', 'compile', 'data', 'checkpoint', 'evaluation')

# Peak dense bfloat16 (on V100: float16) FLOP/s of one device, from the makers' data sheets, without sparsity. The first
# entry whose words all stand in ``device_kind`` counts, so that 'H100 PCIe' comes before 'H100'.
PEAK_FLOPS = (
    ('GB300', 2500e12),
    ('GB200', 2500e12),
    ('B300', 2250e12),
    ('B200', 2250e12),
    ('B100', 1750e12),
    ('H200', 989e12),
    ('H100 PCIe', 756e12),
    ('H100 NVL', 835e12),
    ('H100', 989e12),
    ('GH200', 989e12),
    ('H800', 989e12),
    ('H20', 148e12),
    ('A100', 312e12),
    ('A800', 312e12),
    ('A30', 165e12),
    ('A40', 149.7e12),
    ('A10G', 70e12),
    ('A10', 125e12),
    ('L40S', 362e12),
    ('L40', 181e12),
    ('L4', 121e12),
    ('A6000', 154.8e12),
    ('4090', 165.2e12),
    ('3090', 71e12),
    ('V100', 125e12),
    ('TPU v6', 918e12),
    ('TPU v5p', 459e12),
    ('TPU v5', 197e12),
    ('TPU v4', 275e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device by its ``jax.Device.device_kind``; None when it is not in the table, as no CPU is."""
    words = device_kind.replace('-', ' ').lower().split()
    for name, flops in PEAK_FLOPS:
        if all(word in words for word in name.lower().split()):
            return flops
    return None


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
