"""tokamax (OpenXLA, Apache 2.0), a library of GPU kernels: which version the adapters are written for, and where.

An adapter is `<kernel>/tokamax.py`. It calls what tokamax does not promise to keep, hence one version exactly, the one
that the extra `gpu` installs. The version is code, so that the hash of a verification card covers it.
"""

import functools
import importlib
import importlib.metadata
import math
from collections.abc import Sequence

from kernels_pallas import platform

VERSION = '0.0.17'
HOPPER = 9  # major compute capability: elsewhere tokamax lacks gradients, or no GPU of ours has tried it
MOST = 2**31  # numbers of an array that its indices, of 32 bits, can count


def unavailable(module: str) -> str | None:
    """Why a module of tokamax's cannot be used on the device that is here, or None."""
    capability = platform.compute_capability()
    if capability is None:
        return 'it needs an NVIDIA GPU'
    if capability[0] != HOPPER:
        return f'it is for GPUs of compute capability {HOPPER}.x, this one has {capability[0]}.{capability[1]}'
    return _missing(module)


def too_many(name: str, shape: Sequence[int]) -> str | None:
    """Why an array, as the library's kernels read or write it, is too large for them, or None."""
    if (size := math.prod(shape)) < MOST:
        return None
    return f'{name} has {size} numbers, which indices of 32 bits cannot count'


@functools.cache
def _missing(module: str) -> str | None:
    try:
        version = importlib.metadata.version('tokamax')
    except importlib.metadata.PackageNotFoundError:
        return 'tokamax is not installed; the extra "gpu" has it'
    if version != VERSION:
        return f'it is written for tokamax {VERSION}, {version} is installed'
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a library raises that does not suit what is installed beside it
        return f'tokamax cannot be imported: {error}'
    return None
