"""Errors that are the user's to mend: one line that names the key, file or shape and what would be right."""


class UserError(Exception):
    """Shown as one line, without a traceback; the process exits with code 2."""
