"""Layers on several absent H100s: the kernels run on each device's own tokens, and nothing is gathered for them."""

import re

import pytest

from mixcon_jax.planning import compiling
from mixcon_jax.planning.collectives import collectives
from tests.benchmarks.context_parallel import layer_gradient


# Conba has Mamba's kernels, and the gain's.
@pytest.mark.slow
@pytest.mark.parametrize('name', ['mamba', 'conba'])
def test_kernels_get_their_devices_tokens(name):
    """Two devices a row, two shares of the rows; XLA cannot split a kernel and would give each device all inputs."""
    length = 1536
    module = layer_gradient(name, 2, 4, length, 256, data=2, devices=compiling.devices('h100', devices_per_host=4))
    kernels = [line for line in module.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    shapes = ' '.join(re.findall(r'\w+\[[\d,]+\]', ' '.join(kernels)))
    # Rows times tokens, as a scan of few rows cuts time into slices; a convolution takes some tokens of its past along.
    tokens = {int(rows) * int(time) for rows, time in re.findall(r'bf16\[(\d+),(\d+),', shapes)}
    own = 4 * length // 4
    assert len(kernels) >= 5 and own in tokens and max(tokens) < 1.01 * own
    found = collectives(module)
    assert found['all-gather'] == found['reduce-scatter'] == (0, 0) and found['collective-permute'][0] > 0
