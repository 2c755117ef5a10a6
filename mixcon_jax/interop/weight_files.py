"""The arrays of a published model, from its safetensors files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mixcon_jax import parsing
from mixcon_jax.errors import UserError

TYPES = ('F64', 'F32', 'F16', 'BF16')
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
