"""Timing shared by the benchmarks: interleaved repeats of compiled functions, against a baseline in the same run.

A busy machine slows whatever happens to run at that moment, so the functions take turns, and each is judged by its
fastest turn. A turn is two runs, of which the second is timed: the first pays for the memory and cache that the
function before has left.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@dataclass
class Timing:
    """One function: its fastest run, its compile time and the temporaries XLA allocates for it."""

    name: str
    compile_seconds: float
    temporary_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)


def compile_timed(name: str, function: Callable, args: Sequence[Any]) -> tuple[Callable, Timing]:
    """Compiles `function` for `args` and reads its memory analysis; the caller leaves the persistent cache off."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    return compiled, Timing(name, seconds, compiled.memory_analysis().temp_size_in_bytes)


def compare(cases: Mapping[str, tuple[Callable, Sequence[Any]]], repeats: int = 7) -> dict[str, Timing]:
    """Times every case `name -> (function, args)` by interleaved repeats."""
    compiled = {name: (*compile_timed(name, function, args), args) for name, (function, args) in cases.items()}
    for _ in range(repeats):
        for run, timing, args in compiled.values():
            jax.block_until_ready(run(*args))
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            timing.seconds.append(time.perf_counter() - start)
    return {name: timing for name, (_, timing, _) in compiled.items()}


def worst_error(actual: Any, expected: Any) -> float:
    """The largest relative error, in the 2-norm, of any array of a tree."""
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())
    errors = jax.tree.map(lambda a, b: norm(a.astype(jnp.float32) - b) / norm(b), actual, expected)
    return float(max(jax.tree.leaves(errors)))


def table(timings: Mapping[str, Timing], baseline: str) -> str:
    """Lines of time, temporaries and compile time, the first two also relative to the baseline."""
    base = timings[baseline]
    lines = [f'{"":32}{"ms":>9}{"speed":>8}{"temp MiB":>11}{"share":>8}{"compile s":>11}']
    for name, timing in timings.items():
        share = timing.temporary_bytes / max(base.temporary_bytes, 1)
        lines.append(
            f'{name:32}{1e3 * timing.best:9.1f}{base.best / timing.best:7.2f}x{timing.temporary_bytes / 2**20:11.1f}'
            f'{share:8.3f}{timing.compile_seconds:11.1f}'
        )
    return '\n'.join(lines)
