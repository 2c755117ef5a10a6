"""Which implementation of a function runs: the one that is asked for, or the GPU kernel where it can and a GPU has
shown that it is right."""

import functools
import warnings
from collections.abc import Callable, Sequence

import jax

from kernels_pallas import cards, platform

KERNEL = 'mosaic_gpu'


def check_known(function: str, implementation: str | None, known: Sequence[str]) -> None:
    """Raises ValueError for an implementation that ``function`` does not have."""
    if implementation is not None and implementation not in known:
        raise ValueError(f'{function} has no implementation {implementation!r}; available here: {", ".join(known)}')


def takes_kernel(
    function: str,
    implementation: str | None,
    refusal: Callable[[], str | None],
    instead: str,
    variants: Callable[[], tuple[str, ...]],
    kernel: str | None = None,
    silent: bool = False,
) -> bool:
    """Whether the GPU kernel runs: where it is asked for, or nothing is, the platform is a GPU and cards cover it.

    Args:
      function: the name of the entry point.
      implementation: what the caller asked for; None lets the platform decide.
      refusal: why the kernel cannot run, or None; only asked if the kernel would be the choice.
      instead: what runs if the kernel was the platform's choice and refuses or is not verified, as a warning says,
        once for each reason.
      variants: which of the kernel's variants this call runs, by the names of its cards; asked after `refusal`.
      kernel: name of the kernel's folder, if it is not the function's.
      silent: no warning where it refuses.

    Raises:
      ValueError: the kernel was asked for and refuses.
    """
    if implementation != KERNEL and (implementation is not None or platform.platform() != 'gpu'):
        return False
    reason = refusal()
    if implementation is not None:
        if reason is not None:
            raise ValueError(f'{function}: implementation {KERNEL!r} cannot run here: {reason}')
        return True
    if reason is not None:
        if not silent:
            warn_once(f'{function} runs {instead!r} in place of {KERNEL!r}: {reason}')
        return False
    return cards.trusted() or _covered(function, instead, kernel or function, variants())


def _covered(function: str, instead: str, kernel: str, variants: tuple[str, ...]) -> bool:
    """Whether cards cover these variants on this GPU; a warning says why not, or that they are of another JAX."""
    major = platform.compute_capability()[0]
    reason = cards.uncovered(kernel, variants, major, platform.device().device_kind)
    if reason is not None:
        warn_once(
            f'{function} runs {instead!r} in place of {KERNEL!r}: {reason}; `{cards.COMMAND} {kernel}` verifies it on'
            f' your GPU, {cards.TRUST}=1 runs it all the same',
            level=5,
        )
        return False
    if versions := cards.other_jax(kernel, variants, major):
        warn_once(
            f'{function} runs {KERNEL!r}, verified with jax {versions}, not with jax {jax.__version__};'
            f' `{cards.COMMAND} {kernel}` verifies it again',
            level=5,
        )
    return True


@functools.cache
def warn_once(message: str, level: int = 4) -> None:
    """Warns in the name of the caller of the function that calls ``takes_kernel``, which is the fourth frame up."""
    warnings.warn(message, stacklevel=level)
