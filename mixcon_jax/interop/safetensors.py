"""Arrays of safetensors files: the length of a header, the header in JSON, then the arrays' bytes.

The format is https://huggingface.co/docs/safetensors; it needs no library to be read.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mixcon_jax import parsing
from mixcon_jax.errors import UserError

ONE, INDEX = 'model.safetensors', 'model.safetensors.index.json'  # of a model: in one file, or a list of several
TYPES: dict[str, Any] = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
LENGTH = 8  # bytes of the header's length
LONGEST = 100_000_000  # bytes of a header


def read_model(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a model, mapped and not loaded, by name.

    Args:
      folder: holds ``model.safetensors``, or several files and ``model.safetensors.index.json``.

    Raises:
      UserError: neither is there, or a file is no such file or was cut short.
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
    try:
        data = np.memmap(path, np.uint8, 'r')
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{path}: {reason}; weights are read from safetensors files alone') from error
    length = int.from_bytes(data[:LENGTH].tobytes(), 'little')
    begin = LENGTH + length
    try:
        if len(data) < begin or length > LONGEST:
            raise ValueError('it is shorter than its header says')
        entries = parsing.json_object(data[LENGTH:begin].tobytes())
        return {name: _array(data[begin:], entry) for name, entry in entries.items() if name != '__metadata__'}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path} is no intact safetensors file: {error}') from error


def _array(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    """One array of a file's bytes behind the header.

    Raises:
      ValueError: the entry and the bytes do not fit.
    """
    (first, last), shape = entry['data_offsets'], tuple(entry['shape'])
    if entry['dtype'] not in TYPES:
        raise ValueError(f'arrays of {entry["dtype"]} cannot be read, only of {", ".join(TYPES)}')
    dtype = np.dtype(TYPES[entry['dtype']])
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'bytes {first} to {last} of {len(data)} are no array of {shape}')
    return np.frombuffer(data[first:last], dtype).reshape(shape)
