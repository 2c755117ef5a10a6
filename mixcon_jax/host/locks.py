"""Locks of files; the system releases them when the process dies."""

import errno
import fcntl
from typing import IO, Any

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what some network file systems answer


def take(file: IO[Any], wait: bool = False) -> bool | None:
    """Takes the lock of an open file, for this process and those that inherit the file.

    Args:
      file: Open for writing.
      wait: Until whoever has it lets go.

    Returns:
      True if it is held now, False if another process has it, None where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True
