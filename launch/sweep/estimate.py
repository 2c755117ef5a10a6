"""How long the cases of a sweep take, roughly, and how large their models are.

``python -m launch.sweep.estimate`` prints the FLOP/s of a matrix product on this machine, for cases of which nothing is
known.
"""

import contextlib
import heapq
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import processes
from launch.sweep.cases import Case
from launch.sweep.status import TimedRun, tokens_per_step
from mixcon_jax.errors import UserError

UTILISATION = 0.15  # of a matrix product's FLOP/s, assumed of training when nothing has run yet
MATRIX = {'cpu': 512}  # rows of the matrices that are multiplied; elsewhere OTHER
OTHER_MATRIX = 4096
SECONDS = 0.5  # of products


class Sizes:
    """Parameters and operations of models, counted once each: a count takes a large part of a second."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Any] = {}

    def parameters(self, case: Case) -> Any:
        """``accounting.Counts`` of the case's model."""
        from mixcon_jax.models.accounting import parameter_count  # loads JAX

        return self._once('parameters', _text(case.config.model), lambda: parameter_count(case.config.model))

    def flops_per_token(self, case: Case) -> float:
        from mixcon_jax.models.accounting import flops_per_token

        length = case.config.data.seq_len
        key = f'{length} {_text(case.config.model)}'
        return self._once('flops', key, lambda: flops_per_token(case.config.model, length))

    def _once(self, kind: str, key: str, count: Callable[[], Any]) -> Any:
        if (kind, key) not in self._known:
            self._known[kind, key] = count()
        return self._known[kind, key]


class Estimate:
    """Seconds that cases take, from what has run in the sweep's folder.

    First choice is the speed of runs of the same arm there, whatever their seed; then the operations a second of other
    arms; then ``calibrate``'s operations a second, if it is given and nothing had run when this was made.
    """

    def __init__(
        self, cases: Sequence[Case], workdir: Path, sizes: Sizes, calibrate: Callable[[], float | None] | None = None
    ) -> None:
        self._sizes = sizes
        self._runs = {case.folder: TimedRun(workdir / case.folder) for case in cases}
        self._arms = {case.folder: _arm(case) for case in cases}
        self._measured: dict[str, dict[str, float]] = {}  # {arm: {folder: tokens a second}}
        self._models: dict[str, Case] = {}  # {arm: one of its cases}
        self.look(cases)
        self._product = calibrate() if calibrate is not None and not self._measured else None

    def look(self, cases: Iterable[Case]) -> None:
        """Reads how fast these have been since; what was read of others, and what cannot be read now, is remembered."""
        for case in cases:
            run = self._runs[case.folder]
            with contextlib.suppress(UserError):
                run.update()
            if speed := run.whole_speed(case):
                arm = self._arms[case.folder]
                self._measured.setdefault(arm, {})[case.folder] = speed
                self._models[arm] = case

    @property
    def basis(self) -> str:
        """Where the numbers come from, in words; empty while nothing is known."""
        if self._measured:
            others = set(self._arms.values()) - self._measured.keys()
            more = ', for other models by their operations per token' if others else ''
            return f'the speed of cases that have run here{more}'
        if self._product is not None:
            product = f"{100 * UTILISATION:.0f} % of a matrix product's {self._product / 1e9:.0f} GFLOP/s"
            return f'{product}, as no case has run'
        return ''

    def seconds(self, case: Case, steps: int) -> float | None:
        """Of so many steps of a case; None if nothing is known."""
        arm = self._arms[case.folder]
        speed = self._speed(arm) if arm in self._measured else self._by_operations(case)
        return None if speed is None else steps * tokens_per_step(case.config) / speed

    def _speed(self, arm: str) -> float:
        return statistics.median(self._measured[arm].values())

    def _by_operations(self, case: Case) -> float | None:
        """Tokens a second of an arm that has not run."""
        flops = self._sizes.flops_per_token
        if self._measured:
            rate = statistics.median(self._speed(arm) * flops(model) for arm, model in self._models.items())
        elif self._product is not None:
            rate = self._product * UTILISATION
        else:
            return None
        return rate / flops(case)


def makespan(seconds: Iterable[float], jobs: int) -> float:
    """When the last of these ends, if ``jobs`` at a time are begun in this order."""
    ends = [0.0] * jobs
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


def _arm(case: Case) -> str:
    """What the speed of a case depends on."""
    config = case.config
    train = config.train
    fields = (config.data.seq_len, train.batch_size, train.accum_steps, train.sum_gradients, config.optim.name)
    return f'{_text(config.model)} {_text(config.mesh)} {fields}'


def _text(options: Any) -> str:
    return json.dumps(options.to_dict(), sort_keys=True)


# ----- calibration --------------------------------------------------------------------------------------------------


def product_flops(share: processes.Share, environment: Mapping[str, str]) -> float | None:
    """FLOP/s of a matrix product with this share of the machine, measured by a process of its own.

    None if JAX does not start there: training will say why.
    """
    child = processes.start('launch.sweep.estimate', (), share, environment, subprocess.PIPE)
    try:
        output = child.communicate()[0].decode(errors='replace')
    finally:
        processes.kill([child])
    try:
        return float(output.splitlines()[-1])
    except (IndexError, ValueError):
        return None


def measure() -> float:
    """FLOP/s of a float32 matrix product on JAX's first device."""
    import jax
    import jax.numpy as jnp

    size = MATRIX.get(jax.default_backend(), OTHER_MATRIX)
    product = jax.jit(lambda x: x @ x)
    x = jnp.full((size, size), 1 / size)
    product(x).block_until_ready()
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < SECONDS:
        product(x).block_until_ready()
        count += 1
    return 2 * size**3 * count / elapsed


if __name__ == '__main__':
    processes.end_with_launcher()
    print(measure())
