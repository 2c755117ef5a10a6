"""The arrays of a published model, from its safetensors files and into them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixcon_jax import parsing
from mixcon_jax.errors import UserError

TYPES = ('F64', 'F32', 'F16', 'BF16')
WRITTEN = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}
PART = 5 * 10**9  # bytes of a file that a model is not wholly in
ONE, INDEX = 'model.safetensors', 'model.safetensors.index.json'  # of a model: in one file, or a list of several


def read_model(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a model, by name.

    Args:
      folder: holds ``model.safetensors``, or several files and ``model.safetensors.index.json``.

    Raises:
      UserError: neither is there, a file is no such file or was cut short, or holds another type.
    """
    if (index := parsing.json_file(folder / INDEX)) is None:
        return read(folder / ONE)
    files = index.get('weight_map')
    if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f'{folder / INDEX} has no weight_map of file names')
    found: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(files.values()):
        found |= read(folder / Path(name).name)  # a name, whatever path it may have
    if missing := files.keys() - found.keys():
        raise UserError(f'{folder / INDEX} lists {min(missing)}, which {files[min(missing)]} does not hold')
    return found


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one file; errors as of ``read_model``."""
    if not path.is_file():
        raise UserError(f'there is no file {path}; weights are read from safetensors files alone')
    try:
        with safe_open(path, 'numpy') as file:
            names = list(file.keys())
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in TYPES:
                    raise UserError(f'{name} in {path} is of type {dtype}; ours are read from {", ".join(TYPES)}')
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path} is no intact safetensors file: {error}') from error


def write_model(folder: Path, arrays: Iterable[tuple[str, np.ndarray]], dtype: str, part: int = PART) -> None:
    """Writes a model into ``model.safetensors`` or, where it is larger, several files with their index.

    Args:
      folder: is there, and holds no weights.
      arrays: by name; they are converted and held one file's at a time.
      dtype: one of ``WRITTEN``.
      part: bytes of a file, at most but for a larger array.

    Raises:
      UserError: a file cannot be written.
    """
    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        path = folder / f'{len(files)}.part'
        try:
            path.touch()
            mode = path.stat().st_mode  # as others have it here; the library's file is its maker's alone
            save_file(held, path, {'format': 'pt'})  # without which transformers refuses a file
            path.chmod(mode)
        except (OSError, SafetensorError) as error:
            raise UserError(f'{path} cannot be written: {error}') from error
        files.append(list(held))
        held.clear()

    for name, value in arrays:
        array = np.ascontiguousarray(value, WRITTEN[dtype])
        if held and size + array.nbytes > part:
            flush()
            size = 0
        held[name], size, total = array, size + array.nbytes, total + array.nbytes
    flush()
    if len(files) == 1:
        (folder / '0.part').rename(folder / ONE)
        return
    names = [f'model-{i:05d}-of-{len(files):05d}.safetensors' for i in range(1, len(files) + 1)]
    for i, name in enumerate(names):
        (folder / f'{i}.part').rename(folder / name)
    weight_map = {array: name for name, arrays in zip(names, files, strict=True) for array in arrays}
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
