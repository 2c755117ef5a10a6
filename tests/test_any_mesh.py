"""Any mesh, any pattern, any packing of documents: a step gives one device's loss and gradients."""

import math

import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from mixcon_jax.errors import ConfigError
from mixcon_jax.models import kinds
from tests.test_meshes import assert_same, one_step, validated
from tests.training import packed_batch

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
ROWS, LENGTH = 8, 16
TOLERANCE = 1e-4  # of sixty draws one was 5e-5 apart in float32, in 2 numbers of 288, sums that cancel


@st.composite
def meshes(draw):
    """Up to eight devices along five axes."""
    sizes, left = {}, draw(st.sampled_from((2, 4, 8)))
    for axis in draw(st.permutations(AXES)):
        sizes[axis] = draw(st.sampled_from([size for size in (1, 2, 4, 8) if left % size == 0]))
        left //= sizes[axis]
    sizes['data'] *= left
    return {axis: size for axis, size in sizes.items() if size > 1}


def layers():
    mixers, ffns = st.sampled_from(kinds.names('mixer')), st.sampled_from(kinds.names('ffn'))
    return st.one_of(mixers, st.builds('{}{}{}'.format, mixers, st.sampled_from('+|'), ffns))


# Rows of documents one after another; what exceeds a row is cut off, what a row lacks is padding.
DOCUMENTS = st.lists(st.lists(st.integers(1, LENGTH), max_size=6), min_size=ROWS, max_size=ROWS)


def test_the_options_fit_every_layer():
    """Below, a draw that is refused is passed over: of a layer whose options did not fit that would be every one."""
    for layer in [*kinds.names('mixer'), *(f'attention+{name}' for name in kinds.names('ffn'))]:
        validated(8, {'data': 8}, {'model__pattern': (layer,)})


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(meshes(), st.lists(layers(), min_size=1, max_size=2), DOCUMENTS, st.sampled_from((1, 2)), st.integers(0, 99))
def test_a_step_is_that_of_one_device(mesh, pattern, documents, blocks, seed):
    assume(any(map(sum, documents)))
    devices = math.prod(mesh.values())
    options = {'model__pattern': tuple(pattern), 'model__num_blocks': blocks}
    try:
        validated(devices, mesh, options)
    except ConfigError as refused:  # a layer that this mesh cannot share out
        note(str(refused))
        assume(False)
    batch = packed_batch(seed, documents, LENGTH)
    assert_same(one_step(devices, mesh, options, batch), one_step(1, {}, options, batch), TOLERANCE)
