"""Reading a save back: what it wrote is compared with what it was to write, on the host, one array at a time.

Nothing of the library that wrote it takes part, so whatever went wrong there, or below, is noticed while older
checkpoints are still there and before a run ends with nothing to load.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts

from mixcon_jax.runs import saved
from mixcon_jax.runs.checksums import checksum
from mixcon_jax.errors import UserError
from mixcon_jax.runs.saved import MODEL, Damaged

# Of a path: characters that no library takes for a pattern, an escape or a part of a URL.
PLAIN = re.compile(r'[\w ./+=,@:~()-]*')


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """A path of a folder that libraries take as it is: the folder's own or, as with ``[`` in it, that of a link to it.

    Raises:
      UserError: the system's folder for temporary files has such a path too.
    """
    if PLAIN.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix='mixcon-') as scratch:
        if not PLAIN.fullmatch(scratch):
            raise UserError(f'neither {folder} nor {scratch} is a path that can be saved to; set TMPDIR to a plain one')
        link = Path(scratch) / 'checkpoints'
        link.symlink_to(folder)
        yield link


def verify(folder: Path, step: int, digest: str) -> None:
    """Reads a checkpoint back.

    Args:
      folder: ``workdir/checkpoints``, a path that libraries take as it is.
      step: of the checkpoint.
      digest: ``saved.digest`` of what it was to hold besides arrays, their checksums among it.

    Raises:
      Damaged: it does not hold that.
    """
    contents = saved.contents(folder, step)
    if saved.digest(contents) != digest:
        raise Damaged('its metadata is not what was saved')
    for name, expected in contents['checksums'].items():
        item = 'model' if name.startswith(MODEL) else 'optimizer'
        try:
            array = _read(folder / str(step) / item, name)
        except Exception as error:  # whatever TensorStore finds
            line = next(iter(str(error).splitlines()), '')[:160]
            raise Damaged(f'{name}: {type(error).__name__}: {line}') from error
        if [str(array.dtype), list(array.shape)] != contents['arrays'][name] or checksum(array) != expected:
            raise Damaged(f'{name} does not match its checksum')


def _read(item: Path, name: str) -> np.ndarray:
    """One array of an item, as Orbax writes them: Zarr in an OCDBT store."""
    store = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{item}/'}, 'path': f'{name}/'}
    spec = {'driver': 'zarr', 'kvstore': store, 'fill_missing_data_reads': False}
    return np.asarray(ts.open(spec, open=True, read=True).result().read().result())
