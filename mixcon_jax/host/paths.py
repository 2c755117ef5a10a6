"""Paths that users write: the one place where ``~`` becomes a folder."""

import os
import pwd
from pathlib import Path

from mixcon_jax.errors import UserError


def expand(path: str | os.PathLike[str], name: str = '') -> str:
    """The path, pattern or URL with ``~`` and ``~user`` in front replaced by that user's home folder.

    Args:
      path: as a user wrote it.
      name: of the option that holds it, for the message of an error.

    Raises:
      UserError: there is no such folder, or the path holds a NUL character.
    """
    text = os.fspath(path)
    label = f'{name}={text}' if name else text
    if '\0' in text:
        raise UserError(f'{label!r} holds a NUL character, which no path can')
    if not text.startswith('~'):
        return text
    user, _, rest = text[1:].partition('/')
    home = _home(user)
    if home is None and user:
        raise UserError(f'{label}: there is no user {user}; for a folder of that name write ./~{user}')
    if home is None:
        instead = f'{name} to a folder' if name else 'give the path without ~'
        raise UserError(f'{label}: there is no home folder (HOME is not set); set HOME, or {instead}')
    return os.path.join(home, rest.lstrip('/')) if rest else home


def expand_path(path: str | os.PathLike[str], name: str = '') -> Path:
    """``expand`` as a path; expanding it again changes nothing."""
    expanded = Path(expand(path, name))
    return expanded.absolute() if str(expanded).startswith('~') else expanded  # of ./~, whose ./ a Path drops


def expand_folder(path: str | os.PathLike[str], name: str = '') -> Path:
    """``expand`` of a folder that libraries write to, which want UTF-8.

    Raises:
      UserError: also where the name is not UTF-8.
    """
    expanded = expand_path(path, name)
    if (found := foreign(str(expanded))) is not None:
        raise UserError(f'{name or "the name of the folder"} {found!r} is not UTF-8; take another one')
    return expanded


def foreign(text: str) -> bytes | None:
    """The bytes of a text that came as something else than UTF-8, which Python marks by surrogates; else None."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Surrogates that stand for no byte come from programs alone, such as an experiment file.
        escaped = all(not '\ud800' <= letter <= '\udfff' or '\udc80' <= letter <= '\udcff' for letter in text)
        return text.encode(errors='surrogateescape' if escaped else 'surrogatepass')
    return None


def _home(user: str) -> str | None:
    """The home folder of a user, or of whoever runs this program; None if there is none. An empty HOME is none."""
    if not user and os.environ.get('HOME'):
        return os.environ['HOME']
    try:
        return (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir or None
    except (KeyError, OSError, ValueError):
        return None
