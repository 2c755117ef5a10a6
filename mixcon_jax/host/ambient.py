"""What the environment asks of JAX without the user's asking MixCon for it."""

import os
import re
from collections.abc import Iterator
from types import TracebackType

# Settings that would change numbers, seeds or types below the program's feet, with the values that change nothing.
OFF = ('0', 'false', 'no', 'n', 'f', 'off')
LEFT_OUT = {
    'JAX_ENABLE_X64': OFF,
    'JAX_EXPLICIT_X64_DTYPES': (),
    'JAX_NUMPY_DTYPE_PROMOTION': ('standard',),
    'JAX_NUMPY_RANK_PROMOTION': ('allow',),
    'JAX_DEFAULT_PRNG_IMPL': ('threefry2x32',),
    'JAX_THREEFRY_PARTITIONABLE': ('1', 'true', 'yes', 'y', 't', 'on'),
    'JAX_ENABLE_CUSTOM_PRNG': OFF,
    'JAX_LEGACY_PRNG_KEY': ('allow',),
    'JAX_RANDOM_SEED_OFFSET': ('0',),
    'JAX_TRANSFER_GUARD': ('allow',),
    'JAX_DISABLE_JIT': OFF,  # what is not compiled as a whole rounds otherwise
    'JAX_DEFAULT_MATMUL_PRECISION': ('default',),  # model.dtype is the option for it
}  # fmt: skip
# What JAX says, when it is imported, of a variable that it cannot read.
UNREADABLE = re.compile(r"for environment '(?P<environment>JAX_\w+)'|for JAX flag (?P<flag>jax_\w+)")


def processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def leave_out() -> Iterator[str]:
    """Takes such settings out of the environment, before JAX reads it; yields a line on each that meant something."""
    for name, harmless in LEFT_OUT.items():
        value = os.environ.pop(name, '')
        if value and value.lower() not in harmless:
            yield f'{name}={value} is left out: it would change what is computed'


def complaint(error: BaseException) -> str | None:
    """The line for an exception that JAX raises because of what it finds here; None for any other."""
    if isinstance(error, ValueError) and (match := UNREADABLE.search(str(error))):
        name = match['environment'] or match['flag'].upper()
        return f'JAX cannot read {name}={os.environ.get(name, "")} ({error}); unset it'
    if 'Unable to initialize backend' in str(error) or _starts_devices(error.__traceback__):
        wanted = os.environ.get('JAX_PLATFORMS')
        # JAX's own advice at the end is on its variable alone.
        reason = re.sub(r' \((set|you may need to uninstall) .*', '', str(error), flags=re.DOTALL)
        reason = reason or 'no such device was found'
        if wanted:
            return f'JAX_PLATFORMS={wanted} cannot be used here: {reason}; unset it, or JAX_PLATFORMS=cpu'
        return f'JAX cannot start its devices: {reason}; JAX_PLATFORMS=cpu leaves accelerators out'
    return None


def _starts_devices(frames: TracebackType | None) -> bool:
    """Whether the exception came while JAX was starting its devices."""
    while frames is not None:
        code = frames.tb_frame.f_code
        if code.co_name == 'backends' and code.co_filename.endswith(f'jax{os.sep}_src{os.sep}xla_bridge.py'):
            return True
        frames = frames.tb_next
    return False
