"""Files that people ask for, written as a whole or not at all."""

import errno
import os
from pathlib import Path

from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand_path


def file_to_write(option: str, file: str) -> Path:
    """Where ``option`` wants a file, whose folder is made.

    Raises:
      UserError: a folder is there, or none can be made.
    """
    path = expand_path(file, option)
    if path.is_dir():
        raise UserError(f'{option} {file} is a folder; name a file')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f'{option} {file} cannot be written ({error.strerror})') from error
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Makes or replaces a file as a whole, which is on the disk when this returns."""
    scratch = path.with_name(f'.{path.name}.tmp')
    try:
        with open(scratch, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
