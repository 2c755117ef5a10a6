"""The selective scan's kernels inside whole layers, compiled for an H100 that is not there: bytes and memory.

Nothing runs. Processes of their own compile (`python -m tests.gpu.test_scan_in_layers mamba`), as LLVM may abort them.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.benchmarks.scan_memory import ROOT

BATCH, LENGTH, DIM = 8, 4096, 2048  # 4096 channels
# Bytes over those of u, dt, z, y and, in training, their gradients, each once a pass. Conba's scan has no gate:
# over its own eight arrays it moves 1.573 times the bytes in training, of which 0.5 are the float32 states, one in
# 16 steps written and read, whatever else happens.
LIMITS = {'inference': 1.15, 'training': 1.5}
WITHOUT_GATE = {'inference': 1.15, 'training': 1.58}
GATE = {'inference': 1, 'training': 3}  # arrays like u that z adds: read in both passes, and dz
KEYS = ('kernels', 'floor', 'largest', 'states', 'peak')
CHUNKED_PEAK = 6787 * 2**20  # of the same Mamba layer with the scan in chunks, forward and backward


def figures(mixer: str) -> dict[str, dict]:
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    command = [sys.executable, '-m', 'tests.gpu.test_scan_in_layers', mixer]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize('mixer', ['mamba', 'conba'])
def test_kernels_move_little_more_than_they_must_and_memory_holds_no_state_of_every_token(mixer):
    found = figures(mixer)
    for mode, limit in LIMITS.items():
        kernels, floor, largest, states, peak = (found[mode][key] for key in KEYS)
        moved = sum(kernels.values())
        print(
            f'{mixer}, {mode}: {moved / 2**20:.1f} MiB, floor {floor / 2**20:.1f}, {moved / floor:.3f} times; '
            f'{peak / 2**20:.0f} MiB of memory'
        )
        assert list(kernels) == ['selective_scan_forward', *['selective_scan_backward'] * (mode == 'training')]
        # No [B, T, D, N] in any shape; the states kept for the backward pass are a sixteenth of it.
        assert states == BATCH * LENGTH * 2 * DIM * 16
        assert largest <= states / 8
        if mixer == 'conba':
            assert moved <= WITHOUT_GATE[mode] * floor
            floor += GATE[mode] * BATCH * LENGTH * 2 * DIM * 2
        assert moved <= limit * floor
    if mixer == 'mamba':  # what does not grow with the length is the parameters
        short, long = found['training']['peak'], found['four times as long']['peak']
        print(f'{long / 2**20:.0f} MiB of memory for four times the length')
        assert 3.7 * short <= long <= 4 * short
        assert short <= 0.6 * CHUNKED_PEAK


def main(mixer: str) -> None:
    from tests.benchmarks.compiled_bytes import scan_figures

    run = lambda length, backward: scan_figures('h100', mixer, BATCH, length, DIM, backward)
    found = {'inference': run(LENGTH, False), 'training': run(LENGTH, True)}
    if mixer == 'mamba':
        found['four times as long'] = run(4 * LENGTH, True)
    print(json.dumps(found))


if __name__ == '__main__':
    main(sys.argv[1])
