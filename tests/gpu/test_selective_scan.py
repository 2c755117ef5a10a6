"""The selective scan's kernels as compiled for GPUs that are not there: registers, spills, instructions, barriers.

Nothing runs here. What runs, in the interpreter, is in tests/kernels_pallas/test_mosaic_scan.py.
"""

import pytest

from mixcon_jax.planning import compiling as planning
from tests.gpu.compile_kernels import FULL, VARIANTS, Variant, compiled, table

BARRIERS = {
    'h100': {'forward': 5, 'inference': 5, 'carry': 2, 'cocarry': 2, 'backward': 7},
    'a100': {'forward': 3, 'inference': 3, 'carry': 2, 'cocarry': 2, 'backward': 5},
}
READOUT_BARRIERS = {'forward': 1, 'backward': 4}


# The tuned case and what takes the most of each: registers, shared memory, states, products of a readout.
FEW = [
    variant for variant in VARIANTS if variant.options == FULL and (variant.states, variant.dtype) == (16, 'bfloat16')
]
FEW += [Variant('backward', 64, 'float32', FULL), Variant('backward', options=FULL | {'readout': True})]
FEW += [variant for variant in VARIANTS if variant.options.get('prior') and variant.kernel == 'backward']
assert len(FEW) == 8, 'a name of an option has changed'
SETS = {'h100': ('h100', FEW), 'h100, all': ('h100', VARIANTS), 'a100, all': ('a100', VARIANTS)}


@pytest.fixture(
    scope='module', params=[name if name == 'h100' else pytest.param(name, marks=pytest.mark.slow) for name in SETS]
)
def chosen(request):
    """An A100 is for `make test-all`: no A100 has verified the kernels, so none runs them by default."""
    return SETS[request.param]


@pytest.fixture(scope='module')
def target(chosen):
    return chosen[0]


@pytest.fixture(scope='module')
def figures(chosen):
    """Variants, compiled in a process of its own; printed as a table."""
    target, variants = chosen
    found = compiled(target, tuple(map(str, variants)))
    print(f'\n{target}\n{table(found)}')
    return found


@pytest.mark.slow  # a changed kernel has stale cards, which a fast test says
def test_no_variant_spills_or_needs_atomics(chosen, figures):
    """Forward, backward, both carries, gate, readout, prior; of all, also float32 and 8 to 64 states."""
    assert set(figures) == set(map(str, chosen[1]))
    for name, row in figures.items():
        assert (row['spilled'], row['atomics']) == (0, 0), name


def test_every_variant_fits_a_block_s_shared_memory(target, figures):
    """Mosaic takes Hopper's limit for every GPU, so that on an A100 only the launch would fail."""
    limit = planning.TARGETS[target].shared_bytes_block / 1024
    too_large = {name: row['shared_kib'] for name, row in figures.items() if row['shared_kib'] > limit}
    assert not too_large, limit


def test_the_tuned_case_stays_below_its_ceilings(target, figures):
    """16 states, bfloat16, with gate, softplus and resets, at the sizes that decide how many blocks a core holds."""
    registers, shared, shared_backward = {'h100': (96, 80, 112), 'a100': (104, 40, 80)}[target]
    for kernel in ('forward', 'inference'):
        row = figures[str(Variant(kernel, options=FULL))]
        assert row['registers'] <= registers
        assert row['shared_kib'] <= shared
        assert row['instructions'] <= 135
        assert row['exponentials'] == 16 + 2  # one a state; softplus and gate take one each
        assert row['vector_loads'] == 8  # B and C, four states at a time
    row = figures[str(Variant('backward', options=FULL))]
    assert row['registers'] <= 255
    assert row['shared_kib'] <= shared_backward
    assert row['instructions'] <= 520
    assert row['shuffles'] <= 50
    # 16 states a thread: each is replayed, and all but the last stretch of a tile once before that.
    assert row['exponentials'] - 5 <= 2 * 16  # five of softplus, gate and their derivatives


def test_barriers_stand_around_tiles_and_not_in_steps(target, figures):
    """What the interpreter, for which a block is one thread, cannot see.

    Exact, as one barrier less is a race. A forward kernel waits before a tile is fetched over the last one and before
    y is sent; the backward one also between the tokens' pass and the steps, before sums over warps, between parts of
    the states, and around the products of a readout. What remains is Mosaic's own, at a kernel's beginning and around a
    wait for the copy engine.
    """
    for name, row in figures.items():
        assert row.get('step_barriers', 0) == 0, name
        kernel, states = name.split('-')[0], int(name.split('-')[1][1:])
        expected = BARRIERS[target][kernel] + ('readout' in name) * READOUT_BARRIERS.get(kernel, 0)
        expected += kernel == 'backward' and states not in (8, 16)
        assert row['barriers'] == expected, name
