"""How a command can end: the exit codes, and errors that are the user's to mend, in one line that says what is right.

Free of JAX, as launchers and whatever answers at once need both.
"""

# docs/run-directory.md says what each means. 70 is EX_SOFTWARE; 75 is EX_TEMPFAIL: start it again.
DONE, FAILED, USER_ERROR, ABORTED, FAULT, STOPPED, INTERRUPTED = 0, 1, 2, 3, 70, 75, 130


class UserError(Exception):
    """Names the key, file or shape; shown as one line, without a traceback, and the process exits with code 2."""


class ConfigError(UserError):
    """A configuration that cannot run; the message is one line and names the key."""
