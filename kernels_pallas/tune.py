"""Times tile sizes on the GPU that is here and writes the fastest into a table: `python -m kernels_pallas.tune`.

For every case (states, element type) it tries the forward pass's tiles first, without a gradient, and with the chosen
ones the backward pass's, forward and backward together. Candidates take turns, each is judged by the median of its
turns, and the current settings stay unless another's are faster by 2 %. A candidate that does not compile or gives
another result is named and passed over.
"""

import argparse
import functools
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import platform
from kernels_pallas.selective_scan import mosaic_gpu
from kernels_pallas.selective_scan.mosaic_gpu import tuning
from kernels_pallas.selective_scan.mosaic_gpu.tiles import CHANNELS
from kernels_pallas.selective_scan.mosaic_gpu.tuning import Settings

MARGIN = 0.02  # of time, that a change has to save
TOLERANCE = {'bfloat16': 1e-2, 'float32': 1e-4}  # relative, in the 2-norm; the order of sums may differ
FORWARD = [(tile, unroll) for tile in (8, 16, 32, 64) for unroll in (1, 2, 4)]
BACKWARD = [(tile, stretch) for tile in (8, 16, 32) for stretch in (2, 4, 8) if stretch < tile]


@dataclass(frozen=True)
class Case:
    """What one entry of the table is for, and the size at which it is timed."""

    states: int
    dtype: str
    readout: bool
    batch: int
    length: int
    channels: int

    @property
    def key(self) -> str:
        return tuning.key(self.states, jnp.dtype(self.dtype).itemsize, self.readout)

    def __str__(self) -> str:
        return f'{self.key}, B{self.batch} T{self.length} D{self.channels}'


@dataclass
class Timings:
    """Seconds of a call for every candidate that ran, and why the others did not."""

    seconds: dict[Settings, float] = field(default_factory=dict)
    refused: dict[Settings, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------- choosing
def forward_candidates(current: Settings) -> list[Settings]:
    """The current settings first, then every size of the forward pass."""
    others = (replace(current, forward_tile=tile, unroll=unroll) for tile, unroll in FORWARD)
    return list(dict.fromkeys([current, *others]))


def backward_candidates(current: Settings, forward: Settings) -> list[Settings]:
    """The current settings first, then every size of the backward pass with the chosen ones of the forward pass."""
    others = (replace(forward, backward_tile=tile, stretch=stretch) for tile, stretch in BACKWARD)
    return list(dict.fromkeys([current, forward, *others]))


def choose(incumbent: Settings, seconds: Mapping[Settings, float]) -> Settings:
    """The fastest, or the incumbent where that is slower by less than MARGIN.

    Raises:
      ValueError: there are no times.
    """
    if not seconds:
        raise ValueError('none of the candidates ran')
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] <= (1 - MARGIN) * seconds.get(incumbent, math.inf) else incumbent


def tune(current: Settings, measure: Callable[[Sequence[Settings], bool], Timings]) -> Settings:
    """Chooses for one case and prints its tables; `measure(candidates, with the gradient)` times it.

    Raises:
      ValueError: no candidate ran.
    """
    forward = current
    for gradient in (False, True):
        candidates = backward_candidates(current, forward) if gradient else forward_candidates(current)
        timings = measure(candidates, gradient)
        forward = choose(forward, timings.seconds)
        print('forward + backward' if gradient else 'forward')
        print(table(timings, candidates, current, forward), flush=True)
    return forward


def table(timings: Timings, candidates: Iterable[Settings], current: Settings, chosen: Settings) -> str:
    """A line a candidate: sizes, milliseconds, ratio to the current settings."""
    lines = [f'{"forward tile":>14}{"unroll":>8}{"backward tile":>15}{"stretch":>9}{"ms":>10}{"ratio":>8}']
    for c in candidates:
        line = f'{c.forward_tile:14}{c.unroll:8}{c.backward_tile:15}{c.stretch:9}'
        if c in timings.seconds:
            ratio = timings.seconds[c] / timings.seconds.get(current, math.nan)
            line += f'{1e3 * timings.seconds[c]:10.3f}{ratio:8.3f}'
            line += ' '.join(['', *(name for name, which in (('current', current), ('chosen', chosen)) if c == which)])
        else:
            line += f'  passed over: {timings.refused[c]}'
        lines.append(line)
    return '\n'.join(lines)


# --------------------------------------------------------------------------------------------------------- timing
def time_in_turns(
    build: Callable[[Settings], Callable], candidates: Sequence[Settings], args: Sequence[Any], tolerance: float
) -> Timings:
    """Times `build(candidate)` for `args`: queued calls, so that the host does not count, in turns."""
    timings, runs, first = Timings(), {}, None
    for candidate in candidates:
        try:
            run = jax.jit(build(candidate)).lower(*args).compile()
            result = jax.block_until_ready(run(*args))
            expected = result if first is None else first
            error = float(difference(result, expected))
        except Exception as problem:  # of any kind: compiler, driver, memory
            timings.refused[candidate] = f'{type(problem).__name__}: {str(problem).strip()[:200]}'.splitlines()[0]
            continue
        if error <= tolerance:  # not so for NaN
            first, runs[candidate] = expected, run
        else:
            timings.refused[candidate] = f'its result differs by {error:.1e}'
    turns: dict[Settings, list[float]] = {candidate: [] for candidate in runs}
    for _ in range(5):
        for candidate, run in runs.items():
            calls = max(1, round(0.05 / queued(run, args, 1)))
            turns[candidate].append(queued(run, args, calls))
    timings.seconds = {candidate: float(np.median(seconds)) for candidate, seconds in turns.items()}
    return timings


def queued(run: Callable, args: Sequence[Any], calls: int) -> float:
    """Seconds a call, of several queued one behind the other."""
    start = time.perf_counter()
    for _ in range(calls):
        out = run(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


@jax.jit
def difference(actual: Any, expected: Any) -> jax.Array:
    """The largest relative error, in the 2-norm, of any array."""

    def of(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(of, actual, expected))))


def arrays(case: Case) -> tuple[dict[str, jax.Array], jax.Array]:
    """Inputs with every option on, so that what fits the shared memory here fits it everywhere; and dy."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    tokens = lambda: normal(case.batch, case.length, case.channels).astype(case.dtype)
    rates = jnp.broadcast_to(-jnp.arange(1.0, case.states + 1), (case.channels, case.states))
    found = {
        'u': tokens(), 'dt': tokens(), 'z': tokens(), 'A': rates, 'D': normal(case.channels),
        'B': normal(case.batch, case.length, case.states), 'C': normal(case.batch, case.length, case.states),
        'dt_bias': normal(case.channels) - 4, 'initial_state': normal(case.batch, case.channels, case.states),
        'reset': jax.random.bernoulli(next(keys), 1 / 512, (case.batch, case.length)),
    }  # fmt: skip
    if case.readout:
        found |= {'Z': 0.1 * normal(case.states, case.states), 'g': normal(case.states)}
    return found, tokens()


def measure_scan(case: Case, candidates: Sequence[Settings], gradient: bool) -> Timings:
    """Times the selective scan, or with `gradient` the scan and the gradient of every array."""
    given, dy = arrays(case)
    reset = given.pop('reset')

    def build(settings: Settings) -> Callable:
        scan = functools.partial(mosaic_gpu.scan, dt_softplus=True, splits=1, settings=settings)

        def forward(given, reset, dy):
            return scan(**given, reset=reset)

        def both(given, reset, dy):
            y, pull = jax.vjp(lambda given: scan(**given, reset=reset)[0], given)
            return y, pull(dy)

        return both if gradient else forward

    return time_in_turns(build, candidates, (given, reset, dy), TOLERANCE[case.dtype])


# --------------------------------------------------------------------------------------------------- command line
def cases(options: argparse.Namespace, cores: int) -> list[Case]:
    """One for every number of states and element type, with two blocks of channels a multiprocessor at most."""
    batch = options.batch or max(1, 2 * cores * CHANNELS // options.channels)
    padded = [mosaic_gpu.padded_states(states, options.readout) for states in options.states]
    sizes = (options.readout, batch, options.length, options.channels)
    return [Case(states, dtype, *sizes) for states in dict.fromkeys(padded) for dtype in dict.fromkeys(options.dtype)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f'{text} is less than 1')
        return value

    parser = argparse.ArgumentParser(
        prog='python -m kernels_pallas.tune', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kernel', choices=['selective_scan'], default='selective_scan', help='%(default)s')
    parser.add_argument('--states', type=positive, nargs='+', default=[16], help='numbers of states a channel: 16')
    parser.add_argument('--dtype', choices=list(TOLERANCE), nargs='+', default=list(TOLERANCE), help='of u: both')
    parser.add_argument('--readout', action='store_true', help="the kernels with Conba's scaled readout")
    parser.add_argument('--batch', type=positive, help='rows; as many as give a multiprocessor two blocks')
    parser.add_argument('--length', type=positive, default=4096, help='tokens of a row: %(default)s')
    parser.add_argument('--channels', type=positive, default=4096, help='%(default)s')
    parser.add_argument('--dry-run', action='store_true', help='time and choose, but write nothing')
    parser.add_argument('--out', type=pathlib.Path, default=tuning.TABLE, help="the table; the kernel's own")
    return parser.parse_args(arguments)


class Causes(logging.Filter):
    """Keeps what JAX's log says about GPUs that it could not open, in place of a page on the screen."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            self.found.append(str(record.exc_info[1]))
        return not record.exc_info


def refusal(options: argparse.Namespace) -> str | None:
    """Why nothing can be tuned here, or None."""
    causes, log = Causes(), logging.getLogger('jax._src.xla_bridge')
    log.addFilter(causes)
    try:
        reasons = (
            mosaic_gpu.unsupported(jnp.dtype(dtype), jnp.dtype(dtype), states, options.readout)
            for states in options.states
            for dtype in options.dtype
        )
        reason = next(filter(None, reasons), None)
    finally:
        log.removeFilter(causes)
    if reason:
        details = f' ({"; ".join(causes.found)})' if causes.found and platform.platform() != 'gpu' else ''
        return f'{options.kernel} cannot be tuned here: {reason}{details}'
    if not options.dry_run and not os.access(options.out.parent, os.W_OK):
        return f'{options.out.parent} cannot be written to; name another table with --out, or give --dry-run'
    return None


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if reason := refusal(options):
        print(f'error: {reason}', file=sys.stderr)
        return 2
    device = platform.device()
    generation = tuning.generation(platform.compute_capability())
    print(f'{device.device_kind} ({generation}), {device.core_count} multiprocessors, JAX {jax.__version__}')
    failed = False
    for case in cases(options, device.core_count):
        current = tuning.settings(generation, case.states, jnp.dtype(case.dtype).itemsize, case.readout)
        print(f'\n{case}')
        try:
            chosen = tune(current, functools.partial(measure_scan, case))
        except ValueError as problem:
            print(f'error: {case}: {problem}', file=sys.stderr)
            failed = True
            continue
        print(f'{"stays" if chosen == current else "changes to"}: {chosen}', flush=True)
        if not options.dry_run:
            tuning.update(options.out, generation, {case.key: chosen})
    if not options.dry_run:
        print(f'\nwritten: {options.out}')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
