"""Errors that are the user's to mend: one line that names the key, file or shape and what would be right."""


class UserError(Exception):
    """Shown as one line, without a traceback; the process exits with code 2."""


class ConfigError(UserError):
    """A configuration that cannot run; the message is one line and names the key."""
