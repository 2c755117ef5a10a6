"""When two compiled programs are taken for the same, and what becomes of a card then."""

import dataclasses
import shutil

import pytest

from kernels_pallas import cases
from kernels_pallas.cards import VERIFIED, Card
from tests.gpu import programs
from tests.tiny import ROOT

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


STRANGE = {
    'two instructions in a line': PTX.replace('bar.sync 0;', 'bar.sync 0; bar.sync 0;'),
    'an instruction behind a declaration': PTX.replace('.reg .b32 %r<9>;', '.reg .pred q; setp.lt.s32 q, %r1, 3;'),
    'an instruction in a brace': PTX.replace('bar.sync 0;', '{ add.s32 %r5, %r5, 1; }'),
    'a section that is not for debuggers': PTX + '\n\t.section .text\n{\n}\n',
}
IMPURE = [  # two of which must not change places with what lies between
    ('mov.u32 %r7, %clock;', 'bar.sync 0;', 'st.shared.b32 [%r3], %r7;'),
    ('add.cc.s32 %r7, %r1, %r2;', 'addc.s32 %r8, %r1, %r2;', 'st.shared.b32 [%r7], %r8;'),
    ('ld.param.b32 %r7, [retval0];', 'call.uni (retval0), other, (param0);', 'st.shared.b32 [%r3], %r7;'),
]


@pytest.mark.parametrize('change', STRANGE)
def test_what_is_not_understood_is_an_error(change):
    with pytest.raises(programs.NotUnderstood):
        programs._ptx(STRANGE[change])


@pytest.mark.parametrize('lines', IMPURE, ids=str)
def test_what_hangs_on_more_than_its_operands_stays_in_its_place(lines):
    first, second, use = lines
    assert programs._ptx('\n'.join([first, second, use])) != programs._ptx('\n'.join([second, first, use]))


def test_a_comment_behind_a_label_hides_no_block():
    commented = lambda text: programs._ptx(text.replace('$L__BB0_1:\n', '$L__BB0_1:  // =>This Loop\n'))
    assert commented(PTX) == programs._ptx(PTX)
    assert commented(OTHER['read before the loop']) != programs._ptx(PTX)


def test_of_the_operations_around_nothing_is_lost_but_the_kernels_own_text():
    call = lambda number: (
        f'%1 = stablehlo.custom_call @mosaic_gpu_v2(%0) {{mhlo.backend_config = {{kernel_hash = "h\\\\{number}\\"",'
        f' module = "ML{number}\\EF"}}}} : tensor<2xf32>'
    )
    around = lambda *numbers: programs._around('\n'.join(map(call, numbers)))
    assert around(1, 2, 1)[1] == 2 and around(1, 2, 1) == around(3, 4, 3) != around(1, 2, 2)
    assert programs._around('%c = dense<[true, false]>') != programs._around('%c = dense<[false, true]>')
    with pytest.raises(programs.NotUnderstood):
        programs._around('custom_call @mosaic_gpu_v3(%0) {config = 1}')


@pytest.mark.slow
def test_an_error_in_the_source_makes_another_program(tmp_path):
    """Where documents end, one token off: it changes constants alone, if documents are constants."""
    for name in ('kernels_pallas', 'mixcon_jax', 'tests'):
        shutil.copytree(ROOT / name, tmp_path / name)
    digest = lambda: programs.digests(['adaptive_gain'], jobs=2)['kernels']['adaptive_gain']['variants']
    matrix = [case for case in cases.of('adaptive_gain')[0] if case.variant.startswith('width')]  # the first ones
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, 'of', lambda kernel: (matrix, []))
        patch.setattr(programs, 'ROOT', tmp_path)
        patch.setenv('PYTHONPATH', str(tmp_path))
        before = digest()
        path = tmp_path / 'kernels_pallas' / 'adaptive_gain' / 'mosaic_gpu.py'
        text = path.read_text()
        path.write_text('# a comment\n' + text)
        assert digest() == before
        path.write_text(text.replace('reset[:, 1:]', 'reset[:, :-1]'))
        after = digest()
    assert {(v, c) for v in before for c in before[v] if before[v][c] != after[v][c]} == {
        (v, c) for v in before for c in before[v] if 'resets' in c and not c.startswith('1x1x')
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


def compiled(sources: str | dict, jax: str = '0.12', **digests: str) -> dict:
    cases = digests or {'a': '1', 'b': '2'}
    return {'jax': jax, 'target': 'h100', 'kernels': {'gain': {'sources': sources, 'variants': {'small': cases}}}}


def test_a_card_of_the_same_programs_gets_the_new_sources_and_keeps_what_ran():
    card, words = programs.carry(compiled('old'), compiled('new'), CARD)
    assert card == dataclasses.replace(CARD, sources='new', ran='old') and 'the same 2 programs' in words
    again, _ = programs.carry(compiled('new'), compiled('newer'), card)
    assert (again.sources, again.ran) == ('newer', 'old')


def test_a_variants_own_sources_decide():
    by_variant = lambda small, other: compiled({'small': small, 'other': other})
    assert 'as they were' in programs.carry(by_variant('old', 'old'), by_variant('old', 'new'), CARD)[1]
    assert programs.carry(by_variant('old', 'old'), by_variant('new', 'old'), CARD)[0].sources == 'new'
    assert programs.carry(compiled('old'), by_variant('new', 'old'), CARD)[0].ran == 'old'


@pytest.mark.parametrize(
    'before, now, words',
    [
        (compiled('old'), compiled('new', a='1', b='3'), 'another program for 1 of 2 cases, the first b'),
        (compiled('old'), compiled('new', a='1'), 'other cases'),
        (compiled('other'), compiled('new'), 'not of the sources'),
        (compiled('old', jax='0.11'), compiled('new'), 'jax 0.11 before and 0.12 now'),
        (compiled('old'), compiled('old'), 'as they were'),
        (compiled('old'), compiled('new', a='1', b='refused: too wide'), 'b is refused'),
    ],
)
def test_no_other_card_does(before, now, words):
    card, found = programs.carry(before, now, CARD)
    assert card is CARD and words in found


def test_a_card_of_another_gpu_is_not_carried_by_what_this_one_is_compiled_to():
    ampere = dataclasses.replace(CARD, compute_capability='8.0')
    assert programs.carry(compiled('old'), compiled('new'), ampere)[0] is ampere
