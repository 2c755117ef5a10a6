"""A Mamba and a Conba layer, forward and backward, compiled for an H100 that is not there: what they move, at most.

Nothing runs. Processes of their own compile (`python -m tests.gpu.test_layer_bytes mamba`), as LLVM may abort them.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.benchmarks.scan_memory import ROOT

BATCH, LENGTH, DIM = 8, 4096, 2048  # 4096 channels: 0.25 GiB for each array of them in bfloat16
GIB = 2**30
# GiB, a few per cent above what was counted: products, the scan's kernels, the gain's, the convolution's, the rest.
CEILINGS = {'mamba': (6.6, 4.0, 0.0, 0.8, 1.2), 'conba': (7.2, 3.3, 6.3, 0.8, 12.2)}


@pytest.mark.slow
@pytest.mark.parametrize('mixer', CEILINGS)
def test_a_layer_moves_no_more_than_it_did(mixer):
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    command = [sys.executable, '-m', 'tests.gpu.test_layer_bytes', mixer]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for (name, (launches, moved)), most in zip(found.items(), CEILINGS[mixer], strict=True):
        print(f'{mixer}, {name}: {launches} launches, {moved / GIB:.2f} GiB')
        assert moved <= most * GIB, (name, moved / GIB)
    assert found['products'][1] > 5 * GIB and found['selective scan'][0] == 2


def main(mixer: str) -> None:
    from tests.benchmarks.compiled_bytes import layer_groups

    print(json.dumps(layer_groups('h100', mixer, BATCH, LENGTH, DIM)))


if __name__ == '__main__':
    main(sys.argv[1])
