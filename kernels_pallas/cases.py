"""Cases that a GPU kernel is verified by: outputs and every gradient against float64, and the same bits twice.

A kernel's own are in `<kernel>/cases.py`: `CASES` for what must be right, `TIMED` for what is timed.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, Any]  # of jax.Array
Outputs = tuple[jax.Array, ...]

TOLERANCE = {'bfloat16': 5e-3, 'float32': 2e-5}  # relative, in the 2-norm, by an array's own type


@dataclass(frozen=True)
class Case:
    """One call of a kernel with its gradient.

    Attributes:
      variant: whose card it is for.
      name: sizes and options, in words.
      draw: makes the arrays that are differentiated, by name.
      kernel: `(arrays, interpret) -> outputs`, by the GPU kernel; `interpret` is None or Mosaic's interpreter.
      oracle: `arrays -> outputs`, in the arrays' own type.
      refusal: why the kernel does not take this on the device that is here, or None.
      small: whether it is small enough for the interpreter.
    """

    variant: str
    name: str
    draw: Callable[[], Arrays]
    kernel: Callable[[Arrays, Any], Outputs]
    oracle: Callable[[Arrays], Outputs]
    refusal: Callable[[], str | None]
    small: bool = False


@dataclass(frozen=True)
class Timed:
    """One call that is timed, with the least that it must do.

    Attributes:
      variant: whose card it is for.
      name: sizes, in words.
      draw: makes the arrays that are differentiated.
      kernel: `arrays -> output`, of which the first is what gradients flow back from.
      other: the same by XLA, or None where that takes too long to be worth it.
      forward_bytes, both_bytes: read and written at least, by the forward pass and by both.
      exponentials: of the forward pass.
      both_exponentials: of both; None for three times as many.
    """

    variant: str
    name: str
    draw: Callable[[], Arrays]
    kernel: Callable[[Arrays], jax.Array]
    other: Callable[[Arrays], jax.Array] | None
    forward_bytes: float
    both_bytes: float
    exponentials: float = 0.0
    both_exponentials: float | None = None


class Mismatch(AssertionError):
    """A case is not right; `errors` are relative, by the output's or gradient's name."""

    def __init__(self, message: str, errors: Mapping[str, float]) -> None:
        super().__init__(message)
        self.errors = dict(errors)


def of(kernel: str) -> tuple[list[Case], list[Timed]]:
    """The cases of a kernel, and those that are timed."""
    module = importlib.import_module(f'kernels_pallas.{kernel}.cases')
    return list(module.CASES), list(module.TIMED)


def check(case: Case, interpret: Any = None) -> dict[str, float]:
    """Runs a case twice; returns the relative error of every output and gradient.

    Raises:
      Mismatch: an error is above `TOLERANCE`, or the second call gave other bits.
    """
    arrays = case.draw()
    shapes = jax.eval_shape(case.oracle, arrays)
    keys = jax.random.split(jax.random.key(17), len(shapes))
    cotangents = tuple(jax.random.normal(k, s.shape).astype(s.dtype) for k, s in zip(keys, shapes))

    def graded(function, arrays, cotangents):
        outputs, pull = jax.vjp(function, arrays)
        cast = tuple(c.astype(y.dtype) for c, y in zip(cotangents, outputs))
        return outputs, pull(cast)[0]

    run = lambda arrays, cotangents: graded(lambda a: case.kernel(a, interpret), arrays, cotangents)
    run = run if interpret is not None else jax.jit(run)
    actual = jax.block_until_ready(run(arrays, cotangents))
    again = jax.block_until_ready(run(arrays, cotangents))
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x, np.float64))
        exact = jax.jit(lambda a, c: graded(case.oracle, a, c))
        expected = exact(jax.tree.map(wide, arrays), jax.tree.map(wide, cotangents))
        expected = jax.tree.map(lambda x: np.asarray(x, np.float64), expected)
    errors, wrong = {}, []
    names = [*(f'output {i}' for i in range(len(shapes))), *(f'gradient of {name}' for name in sorted(arrays))]
    for name, a, b in zip(names, jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        errors[name] = relative(a, b)
        if not errors[name] <= TOLERANCE[jnp.dtype(a.dtype).name]:  # not so for NaN
            wrong.append(f'{name} is off by {errors[name]:.1e}')
    if wrong:
        raise Mismatch('; '.join(wrong), errors)
    if not all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(again))):
        raise Mismatch('the same call gave other bits', errors)
    return errors


def random_starts(share: float, batch: int, length: int) -> Any:
    """Where documents start, bool [batch, length]: such a share of the tokens, the same every time; None for none.

    NumPy's arrays, since they are made when a module of cases is imported, which must start no device.
    """
    return np.random.default_rng(batch + length).random((batch, length)) < share if share else None


def relative(actual: jax.Array | np.ndarray, expected: np.ndarray) -> float:
    """Error over the expected array's size, in the 2-norm."""
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected)) / (size or 1.0)


Calls = dict[str, tuple[Callable, tuple]]  # what is compiled, and its arguments, by name


def compiled(case: Timed) -> Calls:
    """The forward pass and both, by the kernel and by XLA, ready to be timed."""
    arrays = case.draw()
    shape = jax.eval_shape(case.kernel, arrays)
    dy = jax.random.normal(jax.random.key(3), shape.shape).astype(shape.dtype)
    found: Calls = {}
    for name, function in (('', case.kernel), ('xla_', case.other)):
        if function is None:
            continue

        def both(arrays, dy, function=function):
            y, pull = jax.vjp(function, arrays)
            return y, pull(dy)[0]

        found[f'{name}forward'] = jax.jit(function).lower(arrays).compile(), (arrays,)
        found[f'{name}both'] = jax.jit(both).lower(arrays, dy).compile(), (arrays, dy)
    return found


def measure(case: Timed, calls: Calls, copy_rate: float, exponential_rate: float) -> dict[str, float]:
    """Milliseconds of each call, with the floors of the kernel's.

    Args:
      case: what to time.
      calls: of `compiled`.
      copy_rate: bytes a second that a copy reads and writes.
      exponential_rate: exponentials a second.
    """
    both = 3 * case.exponentials if case.both_exponentials is None else case.both_exponentials
    floor = lambda moved, exponentials: 1e3 * max(moved / copy_rate, exponentials / exponential_rate)
    found = {
        'forward_floor': floor(case.forward_bytes, case.exponentials),
        'both_floor': floor(case.both_bytes, both),
    } | {name: queued(run, *args) for name, (run, args) in calls.items()}
    return {name: float(f'{value:.4g}') for name, value in found.items()}


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and exponentials a second, of the device that is here."""
    large = jnp.ones((1 << 28,), jnp.float32)
    copy = 2 * large.nbytes / (1e-3 * milliseconds(lambda x: x + 1.0, large))

    def many(x):
        for _ in range(32):
            x = jnp.exp2(x)
        return x

    small = jnp.full((1 << 24,), -0.5, jnp.float32)
    return copy, 32 * small.size / (1e-3 * milliseconds(many, small))


def milliseconds(function: Callable, *args: Any, seconds: float = 0.3) -> float:
    """Median time of a call of a function, queued in batches so that the host does not count."""
    return queued(jax.jit(function), *args, seconds=seconds)


def queued(run: Callable, *args: Any, seconds: float = 0.3) -> float:
    """As `milliseconds`, of what is compiled already."""
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    once = max(time.perf_counter() - start, 1e-5)
    batch = max(1, int(seconds / 5 / once))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(batch):
            out = run(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / batch)
    return 1e3 * float(np.median(times))
