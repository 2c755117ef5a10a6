"""Which implementation of a function runs: the one that is asked for, or the GPU kernel where it can."""

import functools
import warnings
from collections.abc import Callable, Sequence

from kernels_pallas import platform

KERNEL = 'mosaic_gpu'


def check_known(function: str, implementation: str | None, known: Sequence[str]) -> None:
    """Raises ValueError for an implementation that ``function`` does not have."""
    if implementation is not None and implementation not in known:
        raise ValueError(f'{function} has no implementation {implementation!r}; available here: {", ".join(known)}')


def takes_kernel(
    function: str, implementation: str | None, refusal: Callable[[], str | None], instead: str | None
) -> bool:
    """Whether the GPU kernel runs: where it is asked for, or nothing is and the platform is a GPU.

    Args:
      function: the name of the entry point.
      implementation: what the caller asked for; None lets the platform decide.
      refusal: why the kernel cannot run, or None; only asked if the kernel would be the choice.
      instead: what runs if the kernel was the platform's choice and refuses, as a warning says, once for each reason;
        None for no warning.

    Raises:
      ValueError: the kernel was asked for and refuses.
    """
    if implementation != KERNEL and (implementation is not None or platform.platform() != 'gpu'):
        return False
    reason = refusal()
    if reason is None:
        return True
    if implementation is not None:
        raise ValueError(f'{function}: implementation {KERNEL!r} cannot run here: {reason}')
    if instead is not None:
        warn_once(f'{function} runs {instead!r} in place of {KERNEL!r}: {reason}')
    return False


@functools.cache
def warn_once(message: str) -> None:
    """Warns in the name of the caller of the function that calls ``takes_kernel``, which is the fourth frame up."""
    warnings.warn(message, stacklevel=4)
