"""How a command can end: the exit codes, and errors that are the user's to mend, in one line that says what is right.

Free of JAX, as launchers and whatever answers at once need both.
"""

import enum


class Exit(enum.IntEnum):
    """The exit codes; docs/run-directory.md says what each means.

    What became of a run, which its records say in words, ``runs.run`` names.
    """

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    ABORTED = 3
    FAULT = 70  # EX_SOFTWARE
    STOPPED = 75  # EX_TEMPFAIL: start it again
    INTERRUPTED = 130


class UserError(Exception):
    """Names the key, file or shape; shown as one line, without a traceback, and the process exits with code 2."""


class ConfigError(UserError):
    """A configuration that cannot run; the message is one line and names the key."""


def first_line(error: BaseException) -> str:
    """What an exception says, in a line; where its first only announces what follows, the last."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1].strip() if lines[0].endswith(':') else lines[0]
