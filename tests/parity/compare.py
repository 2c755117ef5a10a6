"""Compares two folders of fixtures: `python -m tests.parity.compare COMMITTED NEW`. Processors round differently."""

import json
import pathlib
import sys

import numpy as np

TOLERANCE = 1e-6  # of an array's largest value


def difference(old: np.ndarray, new: np.ndarray) -> float:
    """The largest difference as a share of the largest value; infinite when the two are no match at all."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return np.inf
    if old.dtype.kind not in 'f':
        return 0.0 if np.array_equal(old, new) else np.inf
    return float(np.abs(old - new).max() / max(np.abs(old).max(), np.finfo(np.float32).tiny))


def _configuration(path: pathlib.Path) -> dict | None:
    """What a config.json says, whichever version of transformers wrote it."""
    return json.loads(path.read_text()) | {'transformers_version': None} if path.exists() else None


def main(committed: pathlib.Path, new: pathlib.Path) -> int:
    """Prints one line a case; returns 0 when all are the same."""
    names = sorted({path.name for folder in (committed, new) for path in folder.glob('*.npz')})
    worst = 0.0
    for name in names:
        if not ((committed / name).exists() and (new / name).exists()):
            print(f'{name:26} is only in one of the folders')
            worst = np.inf
            continue
        with np.load(committed / name) as a, np.load(new / name) as b:
            same_keys = set(a.files) == set(b.files)
            largest = max(difference(a[key], b[key]) for key in a.files) if same_keys else np.inf
        print(f'{name:26} {largest:.1e}')
        worst = max(worst, largest)
    files = {path.relative_to(folder) for folder in (committed, new) for path in folder.glob('*/config.json')}
    for path in sorted(files):
        found = [_configuration(folder / path) for folder in (committed, new)]
        if found[0] != found[1]:
            print(f'{path.parent} has another config.json')
            worst = np.inf
    return 0 if names and worst <= TOLERANCE else 1


if __name__ == '__main__':
    sys.exit(main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))
