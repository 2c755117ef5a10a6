"""What a run says of where its parameters lie."""

import pytest

from mixcon_jax import step
from mixcon_jax.parallel import placement
from tests.training import mesh_of, step_config


def said(devices, **options):
    config = step_config(**options)
    steps = step.make_steps(config, mesh_of(config, devices))
    return placement.placement(steps.abstract_state.params, steps.logical_axes, steps.mesh)


def test_every_group_is_named_with_its_share():
    """Of two blocks: the four experts' matrices are 16 x 8 each, three of them, in eight parts."""
    mesh = {'mesh__data': 1, 'mesh__fsdp': 2, 'mesh__expert': 2, 'mesh__tensor': 2, 'model__moe__num_experts': 4}
    lines = said(8, **mesh)
    assert 'experts/expert x embed/fsdp x mlp/tensor: 2 arrays, 2.05k parameters, 256 a device' in lines
    assert 'experts/expert x mlp/tensor x embed/fsdp: 1 array, 1.02k parameters, 128 a device' in lines
    assert 'embed/fsdp: 3 arrays, 80 parameters, 40 a device' in lines
    assert not [line for line in lines if line.startswith('large')]


def test_large_arrays_that_stay_whole_are_named(monkeypatch):
    """A vocabulary of 61 does not split in two."""
    monkeypatch.setattr(placement, 'LARGE', 900)
    lines = said(2, mesh__data=1, mesh__tensor=2)
    assert lines[-1] == 'large, but whole on every device: embedding (976), output (976)'


@pytest.mark.parametrize('devices, lines', [(1, []), (4, ['parameters are whole on every device'])])
def test_where_no_axis_splits_parameters_one_line_says_so(devices, lines):
    assert said(devices) == lines
