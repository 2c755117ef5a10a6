"""When two compiled programs are taken for the same, and what becomes of a card then."""

import dataclasses

import pytest

from kernels_pallas.cards import VERIFIED, Card
from tests.gpu import programs

PTX = """
.visible .entry kernel(.param .u64 kernel_param_0)
{
.reg .b32 %r<9>;
.loc 1 167 0
ld.param::entry.b64 %rd1, [kernel_param_0];
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 4;
add.s32 %r3, %r1, 7;
mov.b32 %r5, 0;
$L__BB0_1:
ld.global.b32 %r4, [%rd1];
st.shared.b32 [%r2], %r4;
bar.sync 0;
add.s32 %r6, %r5, 3;
st.shared.b32 [%r3], %r6;
add.s32 %r5, %r5, 1;
setp.lt.s32 %p1, %r5, 32;
@%p1 bra $L__BB0_1;
ret;
}
"""


def moved(line: str, behind: str) -> str:
    """The program with a line elsewhere."""
    lines = PTX.splitlines()
    lines.remove(line)
    lines.insert(lines.index(behind) + 1, line)
    return '\n'.join(lines)


SAME = {
    'two that compute change places': moved('shl.b32 %r2, %r1, 4;', behind='add.s32 %r3, %r1, 7;'),
    'computed later': moved('add.s32 %r3, %r1, 7;', behind='bar.sync 0;'),
    'other numbers': PTX.replace('%r2', '%r8'),
    'another line of the sources': PTX.replace('167', '168'),
}
OTHER = {
    'another constant': PTX.replace('%r1, 4;', '%r1, 5;'),
    'another operation': PTX.replace('shl.b32', 'shr.b32'),
    'another operand': PTX.replace('%r3, %r1', '%r3, %r2'),
    'stored before the barrier': moved('bar.sync 0;', behind='st.shared.b32 [%r3], %r6;'),
    'counted up before it is read': moved('add.s32 %r5, %r5, 1;', behind='bar.sync 0;'),
    'read before the loop': moved('add.s32 %r6, %r5, 3;', behind='mov.b32 %r5, 0;'),
    'another number of rounds': PTX.replace('%r5, 32', '%r5, 33'),
    'no barrier': PTX.replace('bar.sync 0;', ''),
}


@pytest.mark.parametrize('change', SAME)
def test_the_order_of_what_only_computes_is_no_difference(change):
    assert SAME[change] != PTX
    assert programs._ptx(SAME[change]) == programs._ptx(PTX)


@pytest.mark.parametrize('change', OTHER)
def test_any_other_change_is_one(change):
    assert OTHER[change] != PTX
    assert programs._ptx(OTHER[change]) != programs._ptx(PTX)


CARD = Card('gain', 'small', VERIFIED, 'NVIDIA H200', '9.0', '', '0.12', '0.12', '', 'old', '')


def compiled(sources: str, jax: str = '0.12', **digests: str) -> dict:
    cases = digests or {'a': '1', 'b': '2'}
    return {'jax': jax, 'target': 'h100', 'kernels': {'gain': {'sources': sources, 'variants': {'small': cases}}}}


def test_a_card_of_the_same_programs_gets_the_new_sources_and_keeps_what_ran():
    card, words = programs.carry(compiled('old'), compiled('new'), CARD)
    assert card == dataclasses.replace(CARD, sources='new', ran='old') and 'the same 2 programs' in words
    again, _ = programs.carry(compiled('new'), compiled('newer'), card)
    assert (again.sources, again.ran) == ('newer', 'old')


@pytest.mark.parametrize(
    'before, now, words',
    [
        (compiled('old'), compiled('new', a='1', b='3'), 'another program for 1 of 2 cases, the first b'),
        (compiled('old'), compiled('new', a='1'), 'other cases'),
        (compiled('other'), compiled('new'), 'not of the sources'),
        (compiled('old', jax='0.11'), compiled('new'), 'jax 0.11 before and 0.12 now'),
        (compiled('old'), compiled('old'), 'as they were'),
    ],
)
def test_no_other_card_does(before, now, words):
    card, found = programs.carry(before, now, CARD)
    assert card is CARD and words in found
