"""How a command ends: with an exit code and, when something went wrong, one line that says what."""

import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn

from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host import ambient, system
from mixcon_jax.host.log_filters import shorten_jax
from mixcon_jax.host.output import OutputLost, guarded

LESS_MEMORY = 'take a smaller batch, sequence or model (train.accum_steps and model.remat save memory in training)'
# Of the machine, wherever they come from. Others are the user's to mend where they name a file.
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EROFS, errno.ESTALE)
# What JAX says, of any device, when memory runs out: by status or, where it dispatches on a CPU, in words alone.
NO_MEMORY = re.compile('RESOURCE_EXHAUSTED|[Oo]ut of memory|OUT_OF_MEMORY')
# What JAX says of the processes that it trains with when one of them has gone.
OTHERS = re.compile('UNAVAILABLE|DEADLINE_EXCEEDED|Gloo|[Cc]oordination ?[Ss]ervice')


def exit_with(run: Callable[[], int]) -> NoReturn:
    """Exits with the code that ``run`` returns or, if it raises, with that of ``failed``."""
    with guarded():
        prepare()
        try:
            code = run()
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt, OutputLost) as error:
            code = failed(error)
    sys.exit(code)


def prepare() -> None:
    """What must be done before JAX is imported."""
    shorten_jax()
    for line in ambient.leave_out():
        print(f'note: {line}', file=sys.stderr)


def failed(error: BaseException) -> int:
    """Says in one line what went wrong; returns the exit code. A fault of ours leaves its traceback in a file."""
    if isinstance(error, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
        return Exit.INTERRUPTED
    if isinstance(error, OutputLost):
        # A reader that has gone (head, less) knows, and no word would reach a terminal that has.
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in (errno.EPIPE, errno.EIO):
            print(f'error: the output cannot be written ({error})', file=sys.stderr)
        return Exit.FAILED
    line, code = users(error), Exit.USER_ERROR
    if line is None and of_jax(error) and OTHERS.search(str(error)):
        line, code = f'another process of this run cannot be reached: {named(error)}', Exit.FAILED
    if line is None:
        line, code = f'this is a fault of MixCon: {named(error)}; please report it, with {_kept(error)}', Exit.FAULT
    print(f'error: {one_line(line)}', file=sys.stderr)
    return code


def users(error: BaseException) -> str | None:
    """What to say of an error that the user can mend; None of any other."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    # TensorStore's, by any type of exception; they name the file.
    if system.number(error) not in (0, errno.ENOMEM) and not isinstance(error, OSError):
        return ' '.join(text.split())[:300]
    without_memory = 'RESOURCE_EXHAUSTED' in text or (of_jax(error) and NO_MEMORY.search(text))
    if isinstance(error, MemoryError) or without_memory or system.number(error) == errno.ENOMEM:
        words = ' '.join(re.sub('^[A-Z_]+: ', '', text).split())[:200]
        return f'there is not enough memory{f" ({words})" if words else ""}; {LESS_MEMORY}'
    if isinstance(error, OSError) and error.errno and (error.filename is not None or error.errno in MACHINE):
        where = '' if error.filename is None else f'{os.fsdecode(error.filename)}: '
        return f'{where}{os.strerror(error.errno)}'
    return ambient.complaint(error)


def of_jax(error: BaseException) -> bool:
    """Whether JAX raised it at work, told without importing JAX."""
    return type(error).__name__ == 'JaxRuntimeError'


def named(error: BaseException) -> str:
    """The error's type and the beginning of what it says."""
    words = ' '.join(str(error).split())
    return f'{type(error).__name__}{f": {words[:300]}" if words else ""}'


def one_line(text: str) -> str:
    """The text with whatever would end or change the line spelled out, such as a line's end in the name of a file."""
    return ''.join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _kept(error: BaseException) -> str:
    """Writes the traceback to a file of its own; returns how to find it."""
    frames = ''.join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix='mixcon-fault-', suffix='.txt')
        with open(handle, 'w', encoding='utf-8', errors='backslashreplace') as file:
            file.write(f'{sys.argv}\n{frames}')
        return f'its traceback in {path}'
    except OSError:
        sys.stderr.write(frames)
        return 'the traceback above'
