"""``mixcon.json``, by which a folder is known for a run's: nothing is written or deleted in anyone else's.

It also holds what must not be decided twice before there is a checkpoint: which weights ``train.init_from`` meant.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixcon_jax.config import leaves
from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand_path
from mixcon_jax.parsing import json_file
from mixcon_jax.runs import saved
from mixcon_jax.runs.run import CHECKPOINTS, CONFIG, METRICS

MARK = 'mixcon.json'
PROGRAM = 'mixcon_jax'
# What a run writes. Any of it in a folder without the mark is someone else's.
NAMES = (MARK, CONFIG, 'tokenizer.json', METRICS, CHECKPOINTS, 'tensorboard', 'profile', 'wandb_id.txt')


def path_of(path: str | Path, option: str = '--workdir') -> Path:
    """The folder that an argument names, ``~`` expanded.

    Raises:
      UserError: it is empty, as that of a variable that is not set, or names an unknown home.
    """
    if not str(path).strip():
        raise UserError(f'{option} is empty; name a folder')
    return expand_path(path, option)


def read(folder: str | Path) -> dict[str, Any] | None:
    """What the mark says, or None: there is none of this program."""
    found = json_file(Path(folder) / MARK)
    return found if found is not None and found.get('program') == PROGRAM else None


def made_of(folder: str | Path) -> str:
    """What a run was made of by other means than training, and was not trained since; '' of any other run."""
    found = (read(folder) or {}).get('init_from')
    if os.path.exists(Path(folder) / METRICS) or not isinstance(found, dict) or 'fingerprint' in found:
        return ''  # with a fingerprint it says what training began from
    return str(found.get('source')) if saved.steps(Path(folder) / CHECKPOINTS) == [found.get('step')] else ''


def text(values: Mapping[str, Any]) -> str:
    """The mark's text with further values."""
    return json.dumps({'program': PROGRAM, 'format': 1, **values}, indent=2) + '\n'


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run's: by its mark or, of a run from before there were marks, by what only runs hold.

    That is a configuration of ours, or a checkpoint that matches its checksum.
    """
    folder = Path(folder)
    return (
        read(folder) is not None
        or _is_configuration(json_file(folder / CONFIG) or {})
        or saved.newest(folder / CHECKPOINTS) is not None
    )


def require_ours(folder: str | Path) -> None:
    """Refuses a folder in which a run would take over files that are not a run's.

    Raises:
      UserError: names them.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f'{folder} is a file; name a folder')
    foreign = [name for name in NAMES if os.path.lexists(folder / name) and not _is_empty(folder / name)]
    if foreign and not is_run(folder):
        raise UserError(
            f'{folder} holds {", ".join(foreign)}, but is no run of mixcon; take another workdir, or move them away'
        )


def require_place(path: Path) -> None:
    """Refuses a place for a folder of a run where there is something else; changes nothing.

    Raises:
      UserError: there is a file, or a link that leads nowhere, as to a disk that is not mounted.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(f'{path} is a link to {os.readlink(path)}, which is not there; mount or make it')
    if path.exists() and not path.is_dir():
        raise UserError(f'{path} is no folder; move it away')


def require_folder(path: Path) -> None:
    """Makes a folder of a run, unless it or a link to one is there.

    Raises:
      UserError: see ``require_place``.
      OSError: it cannot be made.
    """
    require_place(path)
    path.mkdir(parents=True, exist_ok=True)


def _is_empty(path: Path) -> bool:
    """Whether it is a folder without anything in it, or a link that leads nowhere: nothing to lose."""
    try:
        return not os.listdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:  # a file, or a folder that may hold anything
        return error.errno == errno.ELOOP


def _is_configuration(values: Mapping[str, Any]) -> bool:
    """Whether it is a run's: it names options of ours alone and, as no other program's does by chance, most of them."""
    known, named = {key for key, _ in leaves()}, set(_keys(values))
    return named <= known and 2 * len(named) > len(known)


def _keys(values: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
    """The dotted keys of nested objects."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f'{prefix}{name}.')
        else:
            yield prefix + name
