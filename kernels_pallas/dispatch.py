"""Which implementation of a function runs: the one that is asked for, or the first of its candidates that can and may.

A call lists its candidates, the fastest first; each says why it cannot take the call. What is written for a GPU runs
unasked only where a GPU has shown that it is right.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kernels_pallas import cards, platform

# What a warning does not name: our own files, and JAX's, which stand between where it traces a call.
PASSED_OVER = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (__file__, jax.__file__))


def never() -> None:
    """The refusal of a candidate that takes every call."""
    return None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation, for one call.

    Attributes:
      name: of the implementation.
      run: computes the call.
      refuses: why it cannot take this call, or None.
      variants: of a GPU kernel alone: which of its programs this call runs, by the names of its cards; only asked if it
        does not refuse.
      by_name: runs only where it is asked for.
      silent: no warning where it would be the choice on a GPU and refuses.
    """

    name: str
    run: Callable[[], Any]
    refuses: Callable[[], str | None] = never
    variants: Callable[[], tuple[str, ...]] | None = None
    by_name: bool = False
    silent: bool = False


def choose(
    function: str, implementation: str | None, candidates: Sequence[Candidate], kernel: str | None = None
) -> Candidate:
    """The candidate that runs: the one of that name, else the first that belongs here, can, and is verified.

    A warning says, once for each reason, why a GPU kernel was passed over on a GPU.

    Args:
      function: the name of the entry point.
      implementation: what the caller asked for; None lets the platform decide.
      candidates: the best first; the last that is not `by_name` takes every call.
      kernel: name of the kernel's folder, if it is not the function's.

    Raises:
      ValueError: there is no implementation of that name, or it refuses.
    """
    if implementation is not None:
        return _named(function, implementation, candidates)
    *better, chosen = (candidate for candidate in candidates if not candidate.by_name)
    passed_over = []
    for candidate in better:
        if candidate.variants is not None and platform.platform() != 'gpu':
            continue
        if (reason := candidate.refuses()) is not None:
            if candidate.variants is not None and not candidate.silent:
                passed_over.append(f'{candidate.name!r}: {reason}')
            continue
        if candidate.variants is None or cards.trusted():
            chosen = candidate
            break
        if (reason := _uncovered(function, kernel or function, candidate)) is None:
            chosen = candidate
            break
        passed_over.append(f'{candidate.name!r}: {reason}')
    for one in passed_over:
        warn_once(f'{function} runs {chosen.name!r} in place of {one}')
    return chosen


def _named(function: str, implementation: str, candidates: Sequence[Candidate]) -> Candidate:
    by_name = {candidate.name: candidate for candidate in candidates}
    if implementation not in by_name:
        known = ', '.join(by_name)  # the best first, as they would be chosen
        raise ValueError(f'{function} has no implementation {implementation!r}; available here: {known}')
    if (reason := by_name[implementation].refuses()) is not None:
        raise ValueError(f'{function}: implementation {implementation!r} cannot run here: {reason}')
    return by_name[implementation]


def _uncovered(function: str, kernel: str, candidate: Candidate) -> str | None:
    """Why cards do not cover the candidate on this GPU, or None; a warning says that they are of another JAX."""
    variants = candidate.variants() if candidate.variants is not None else ()
    major = platform.compute_capability()[0]
    reason = cards.uncovered(kernel, variants, major, platform.device().device_kind)
    if reason is not None:
        return f'{reason}; `{cards.COMMAND} {kernel}` verifies it on your GPU, {cards.TRUST}=1 runs it all the same'
    if versions := cards.other_jax(kernel, variants, major):
        warn_once(
            f'{function} runs {candidate.name!r}, verified with jax {versions}, not with jax {jax.__version__};'
            f' `{cards.COMMAND} {kernel}` verifies it again'
        )
    return None


@functools.cache
def warn_once(message: str) -> None:
    """Warns in the name of who calls a kernel: neither the kernels' own lines, nor JAX's while it traces them."""
    warnings.warn(message, stacklevel=2, skip_file_prefixes=PASSED_OVER)
