"""Exchanges of compiled modules: the groups of devices that XLA writes in three ways, and what travels how far."""

import pytest

from mixcon_jax.planning.collectives import axes_of, exchanges, groups_of
from mixcon_jax.planning.hlo import Kernel

MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}


@pytest.mark.parametrize(
    'text, groups, axes',
    [
        ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', [[0, 1], [2, 3], [4, 5], [6, 7]], 'tensor'),
        ('replica_groups=[4,2]<=[8]', [[0, 1], [2, 3], [4, 5], [6, 7]], 'tensor'),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', [[0, 4], [1, 5], [2, 6], [3, 7]], 'data'),
        ('replica_groups=[2,4]<=[2,2,2]T(1,0,2)', [[0, 1, 4, 5], [2, 3, 6, 7]], 'data+tensor'),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", [[0, 2], [1, 3], [4, 6], [5, 7]], 'fsdp'),
        ('', [[0, 1, 2, 3, 4, 5, 6, 7]], 'data+fsdp+tensor'),
    ],
)
def test_groups(text, groups, axes):
    found = groups_of(text, 8)
    assert sorted(map(sorted, found)) == groups
    assert axes_of(found, MESH) == axes


def kernel(kind, operand, result, groups, count=1):
    return Kernel('k', kind, 0, count, result, [operand], groups=groups)


def test_bytes_are_those_of_rings():
    """Four devices of two hosts: a gather sends 3/4 of the whole, a sum twice that; half of a ring's ports lead out."""
    everywhere = 'replica_groups=[1,4]<=[4]'
    (gather,) = exchanges([kernel('all-gather', 'f32[10]', 'f32[40]', everywhere, 3)], {'fsdp': 4}, [0, 0, 1, 1])
    assert (gather.count, gather.bytes, gather.hosts) == (3, 3 * 160, 2)
    assert gather.sent == 3 * 160 * 3 / 4 and gather.across == gather.sent / 2
    (total,) = exchanges([kernel('all-reduce', 'f32[40]', 'f32[40]', everywhere)], {'fsdp': 4}, [0] * 4)
    assert total.sent == 160 * 3 / 4 * 2 and total.across == 0
    (scatter,) = exchanges([kernel('reduce-scatter', 'f32[40]', 'f32[10]', everywhere)], {'fsdp': 4}, [0] * 4)
    assert scatter.sent == 160 * 3 / 4


def test_what_starts_an_exchange_lists_operands_too_and_counts_once():
    started = [
        kernel('all-reduce-start', 'f32[40]', '((f32[40]), f32[40])', ''),
        kernel('all-gather-start', 'f32[10]', '((f32[10]), f32[40])', ''),
        kernel('reduce-scatter-start', 'f32[40]', '((f32[40]), f32[10])', ''),
    ]
    assert [one.bytes for one in exchanges(started, {'fsdp': 4}, [0] * 4)] == [160] * 3
