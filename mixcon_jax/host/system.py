"""What the operating system says went wrong, whoever passes it on: Python by ``errno``, TensorStore in words."""

import errno
import os
import re
from collections.abc import Iterator

ABSENT = (0, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # no error, or nothing there that could be read
IN_WORDS = re.compile(r"(?:os_error_code='|\[OS error )(\d+)")
# How errors of storage behind a URL begin, which have no number, when they say nothing about what is stored there.
STATUS = re.compile('UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED')


def number(error: BaseException) -> int:
    """The system's number of an error; 0 if it has none."""
    found = IN_WORDS.search(str(error))
    return int(found[1]) if found else getattr(error, 'errno', None) or 0


def refusal(error: BaseException | None) -> str:
    """Why something that may be intact cannot be read, of an error or its causes; '' if it is not there, or wrong."""
    for each in _with_causes(error):
        if (code := number(each)) not in ABSENT:
            return os.strerror(code)
        if not code and (found := STATUS.match(str(each))):
            return found[0]
    return ''


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
