"""Cards: what makes them stale, what they cover, and what a call runs by them."""

import dataclasses
import json
import os
import pathlib
import shutil
import types
import warnings

import jax
import jaxtyping
import pytest

from kernels_pallas import cards, cases, dispatch, platform, verify
from kernels_pallas.cards import Card

OURS = ['adaptive_gain', 'causal_conv1d', 'grouped_matmul', 'selective_scan', 'ssd']
ADAPTED = ['attention']  # to a library's kernels
KERNELS = sorted(OURS + ADAPTED)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No environment of the user's, and nothing remembered."""
    monkeypatch.delenv(cards.TRUST, raising=False)
    cards.forget()
    dispatch.warn_once.cache_clear()
    yield
    cards.forget()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package whose files and cards may be changed, and no local cards."""
    folder = tmp_path / 'kernels_pallas'
    shutil.copytree(cards.PACKAGE, folder, ignore=shutil.ignore_patterns('__pycache__'))
    monkeypatch.setattr(cards, 'PACKAGE', folder)
    monkeypatch.setenv(cards.FOLDER, str(tmp_path / 'local'))
    return folder


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    monkeypatch.setattr(platform, 'compute_capability', lambda: (9, 0))
    monkeypatch.setattr(platform, 'device', lambda: types.SimpleNamespace(device_kind='NVIDIA H100'))


def made(**values) -> Card:
    """A card that counts: of the running sources of one variant of the gain, on a Hopper GPU."""
    default = Card(
        'adaptive_gain', 'width32', cards.VERIFIED, 'NVIDIA H100', '9.0', '580.1', jax.__version__, '', '2026-11-26',
        cards.source_hash('adaptive_gain'), 'test',
    )  # fmt: skip
    return dataclasses.replace(default, **values)


def shipped(copy, *made: Card) -> None:
    """Makes these the only cards of the gain."""
    path = copy / 'adaptive_gain' / cards.FILE
    path.unlink(missing_ok=True)
    cards.write(path, made)
    cards.forget()


# ------------------------------------------------------------------------------------------------------------ sources
def test_the_kernels_and_what_they_are_built_from():
    assert cards.kernels() == KERNELS
    names = {k: {path.relative_to(cards.PACKAGE).as_posix() for path in cards.sources(k)} for k in KERNELS}
    assert all({'mosaic.py', 'platform.py'} <= names[kernel] for kernel in OURS)
    assert all(names[k] >= {'platform.py', 'tokamax.py', f'{k}/tokamax.py'} for k in ADAPTED)
    assert {'attention/tokamax.py', 'attention/mosaic_gpu.py', 'mosaic.py'} <= names['attention']
    cudnn = {path.relative_to(cards.PACKAGE).as_posix() for path in cards.sources('attention', 'cudnn_wide')}
    assert cudnn == {'attention/cudnn.py', 'platform.py'} and 'attention/cudnn.py' not in names['attention']
    assert names['grouped_matmul'] == {
        'mosaic.py',
        'platform.py',
        'grouped_matmul/mosaic_gpu.py',
        'grouped_matmul/tiles.py',
    }
    assert {'selective_scan/mosaic_gpu/backward.py', 'affine.py'} <= names['selective_scan']
    assert names['causal_conv1d'] == {'mosaic.py', 'platform.py', 'causal_conv1d/mosaic_gpu.py'}
    assert names['ssd'] == {'mosaic.py', 'platform.py'} | {
        f'ssd/mosaic_gpu/{name}.py' for name in ('__init__', 'chain', 'gradients', 'tiles')
    }
    assert 'adaptive_gain/reference.py' in names['adaptive_gain']  # EPS
    own, shared = 'adaptive_gain/diagonal_mosaic_gpu.py', {'mosaic.py', 'platform.py', 'adaptive_gain/reference.py'}
    diagonal = {path.relative_to(cards.PACKAGE).as_posix() for path in cards.sources('adaptive_gain', 'diagonal32')}
    assert diagonal == {own} | shared and own not in names['adaptive_gain']
    assert names['adaptive_gain'] == {'adaptive_gain/mosaic_gpu.py'} | shared
    assert cards.sources('adaptive_gain', 'width32') == cards.sources('adaptive_gain')
    others = ('api.py', 'xla.py', 'cards.py', 'verify.py', 'cases.py')
    assert not any(name.endswith(other) for found in names.values() for name in found for other in others)


@pytest.mark.parametrize(
    'file, changed',
    [
        ('causal_conv1d/mosaic_gpu.py', {'causal_conv1d'}),
        ('selective_scan/mosaic_gpu/tiles.py', {'selective_scan'}),
        ('mosaic.py', {*OURS, 'attention'}),
        ('attention/mosaic_gpu.py', {'attention'}),
        ('tokamax.py', set(ADAPTED)),
        ('attention/tokamax.py', {'attention'}),
        ('attention/cudnn.py', set()),
        ('platform.py', set(KERNELS)),
        ('selective_scan/xla.py', set()),
    ],
)
def test_a_changed_source_line_makes_the_cards_stale(copy, file, changed):
    before = {kernel: cards.source_hash(kernel) for kernel in KERNELS}
    path = copy / file
    path.write_text(path.read_text() + '\nEXTRA = 1\n')
    cards.forget()
    assert {kernel for kernel in KERNELS if cards.source_hash(kernel) != before[kernel]} == changed
    for kernel in KERNELS:
        assert all(
            card.current == (card.sources == cards.source_hash(kernel, card.variant)) for card in cards.shipped(kernel)
        )


def test_a_variant_whose_files_are_its_own_is_stale_by_them_alone(copy):
    variants = 'width32', 'diagonal32'
    for file, changed in (('diagonal_mosaic_gpu.py', {'diagonal32'}), ('mosaic_gpu.py', {'width32'})):
        before = [made(variant=name, sources=cards.source_hash('adaptive_gain', name)) for name in variants]
        path = copy / 'adaptive_gain' / file
        path.write_text(path.read_text() + '\nEXTRA = 1\n')
        cards.forget()
        assert {card.variant for card in before if not card.current} == changed


def test_comments_docstrings_and_layout_are_not_code():
    """Nor how many spaces a block is indented by; parentheses around a line that was broken are."""
    text = '"""Doc."""\n\nX = 1  # one\n\n\ndef f(a):\n    """Doc of f."""\n    return a + X\n'
    same = '"""Other."""\nX = 1\ndef f(a):\n  "A doc."\n\n  # why\n  return (\n      a + X\n  )\n'
    plain = lambda tokens: [token for token in tokens if token not in ('(', ')')]
    assert plain(cards.code(text)) == plain(cards.code(same))
    assert cards.code(text) == cards.code(text.replace('Doc', 'Words').replace('# one', '# 1').replace('    ', '  '))
    for other in ('X = 2', "X = 'one'", 'X = 1\nY = 2', 'if X:\n    X = 1'):
        assert cards.code(other) != cards.code('X = 1')
    assert cards.code("X = 'a'") != cards.code("X = 'b'")
    assert cards.code('if a:\n    b\n    c') != cards.code('if a:\n    b\nc')


def test_every_shipped_card_is_whole_and_the_stale_ones_are_listed():
    """Recomputes every hash; a stale card is no error, since not everybody who changes a kernel has a GPU."""
    for kernel in KERNELS:
        variants = {case.variant for case in cases.of(kernel)[0]} | {timed.variant for timed in cases.of(kernel)[1]}
        found = cards.shipped(kernel)
        assert {card.variant for card in found} <= variants
        assert all(card.kernel == kernel and len(card.sources) == 16 and card.date for card in found)
        for card in found:
            if card.outcome == cards.VERIFIED:
                assert card.cases and all(error < 5e-3 for error in card.cases.values()), card
    stale = [
        f'{c.kernel} ({c.variant}) on {c.device} of {c.date}'
        for k in KERNELS
        for c in cards.shipped(k)
        if not c.current
    ]
    if stale:
        warnings.warn(f'stale cards, whose kernels no longer run by default: {", ".join(stale)}', stacklevel=1)
    standing = verify.standing()
    assert {(part.kernel, part.variant) for part, _ in standing} >= {
        (c.kernel, c.variant) for k in KERNELS for c in cards.shipped(k)
    }
    assert all(('stale' in card.state) == (not card.current) for _, found in standing for card in found)


# ------------------------------------------------------------------------------------------------------------- coverage
def test_what_a_card_covers(copy):
    uncovered = lambda *variants, major=9: cards.uncovered('adaptive_gain', variants, major)
    shipped(copy)
    assert uncovered('width32') == 'no GPU of compute capability 9.x has verified adaptive_gain (width32)'
    shipped(copy, made())
    assert uncovered('width32') is None
    assert uncovered('width32', 'width16') == 'no GPU of compute capability 9.x has verified adaptive_gain (width16)'
    assert 'capability 8.x' in uncovered('width32', major=8)
    shipped(copy, made(sources='0' * 16))
    assert uncovered('width32') == 'adaptive_gain (width32) has changed since a GPU verified it'
    for outcome in ('crashes (exit code -11)', 'ran, numbers not compared'):
        shipped(copy, made(outcome=outcome))
        assert uncovered('width32') == f'adaptive_gain (width32): {outcome}, on NVIDIA H100'
    both = made(outcome='fails'), made(device='NVIDIA H200')
    shipped(copy, *both)  # what this GPU model has shown comes before what its like have
    of = lambda device: cards.uncovered('adaptive_gain', ['width32'], 9, device)
    assert of('NVIDIA H200') is None and of('NVIDIA GH200') is None
    assert of('NVIDIA H100') == 'adaptive_gain (width32): fails, on NVIDIA H100'


def test_local_cards_count_like_shipped_ones(copy, tmp_path):
    shipped(copy)
    cards.write(cards.local_folder() / 'adaptive_gain.json', [made()])
    cards.forget()
    assert cards.local_folder() == tmp_path / 'local'
    assert [card.variant for card in cards.local('adaptive_gain')] == ['width32']
    assert cards.uncovered('adaptive_gain', ['width32'], 9) is None


def test_what_this_machine_has_found_decides(copy):
    """Also where a shipped card says otherwise: another driver or JAX may be at fault here."""
    shipped(copy, made())
    cards.write(cards.local_folder() / 'adaptive_gain.json', [made(outcome='crashes: CUDA_ERROR_ILLEGAL_INSTRUCTION')])
    cards.forget()
    told = 'adaptive_gain (width32): crashes: CUDA_ERROR_ILLEGAL_INSTRUCTION, on NVIDIA H100'
    assert cards.uncovered('adaptive_gain', ['width32'], 9, 'NVIDIA H100') == told
    cards.write(cards.local_folder() / 'adaptive_gain.json', [made(outcome='crashes', sources='of other lines')])
    cards.forget()
    assert cards.uncovered('adaptive_gain', ['width32'], 9, 'NVIDIA H100') is None


def test_several_processes_go_by_shipped_cards_alone(copy, monkeypatch):
    """One host's own cards would have it trace another program than its like."""
    shipped(copy)
    cards.write(cards.local_folder() / 'adaptive_gain.json', [made()])
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    cards.forget()
    assert cards.uncovered('adaptive_gain', ['width32'], 9) is not None


def test_another_jax_is_asked_of_every_variant(copy):
    shipped(copy, made(), made(variant='width16', jax='0.11.9'))
    assert cards.other_jax('adaptive_gain', ['width32'], 9) is None
    assert cards.other_jax('adaptive_gain', ['width32', 'width16'], 9) == '0.11.9'


def test_where_local_cards_lie(monkeypatch, tmp_path):
    for name in (cards.FOLDER, 'JAX_COMPILATION_CACHE_DIR', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert cards.local_folder() == tmp_path / '.cache' / 'mixcon' / 'kernels'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    assert cards.local_folder() == tmp_path / 'cache' / 'mixcon' / 'kernels'
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'gs://bucket/xla')
    assert cards.local_folder() == tmp_path / 'cache' / 'mixcon' / 'kernels'
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'xla'))
    assert cards.local_folder() == tmp_path / 'mixcon_kernels'
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')

    def homeless():
        raise RuntimeError('no home')

    monkeypatch.setattr(pathlib.Path, 'home', homeless)
    assert cards.local_folder() == tmp_path / 'cache' / 'mixcon' / 'kernels'
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert cards.local_folder() is None and cards.local('adaptive_gain') == []


def test_writing_keeps_other_cards_and_replaces_their_like(tmp_path):
    path = tmp_path / 'new' / 'cards.json'
    cards.write(path, [made(), made(variant='width16')])
    cards.write(path, [made(date='2027-01-01'), made(device='NVIDIA H200')])
    found = {(card.variant, card.device): card.date for card in cards.read(path)}
    assert found == {
        ('width16', 'NVIDIA H100'): '2026-11-26',
        ('width32', 'NVIDIA H100'): '2027-01-01',
        ('width32', 'NVIDIA H200'): '2026-11-26',
    }
    assert [entry.name for entry in path.parent.iterdir()] == ['cards.json']
    cards.write(path, [made(times={'B8': {'forward': 1.0}})])
    cards.write(path, [made(date='2027-02-02')])  # the same sources: the times still hold
    (kept,) = (card for card in cards.read(path) if (card.variant, card.device) == ('width32', 'NVIDIA H100'))
    assert (kept.date, kept.times) == ('2027-02-02', {'B8': {'forward': 1.0}})
    later = json.loads(path.read_text())
    later['cards'][0]['new'] = 'of a later version'
    path.write_text(json.dumps(later))
    assert len(cards.read(path)) == 3
    for broken in ('', '[]', '{"cards": [{"kernel": "x"}]}', json.dumps({'cards': 3})):
        path.write_text(broken)
        assert cards.read(path) == []


# ------------------------------------------------------------------------------------------------------------- dispatch
def takes(implementation=None, refusal=None, silent=False) -> bool:
    """Whether the kernel runs."""
    kernel = dispatch.Candidate('mosaic_gpu', bool, lambda: refusal, lambda: ('width32',), silent=silent)
    candidates = kernel, dispatch.Candidate('chunked', bool)
    return dispatch.choose('matrix_gain', implementation, candidates, kernel='adaptive_gain') is kernel


def test_an_unverified_kernel_is_replaced_with_one_warning(copy, hopper, monkeypatch):
    shipped(copy)
    told = (
        r"matrix_gain runs 'chunked' in place of 'mosaic_gpu': no GPU of compute capability 9\.x has verified "
        r'adaptive_gain \(width32\); `python -m kernels_pallas\.verify adaptive_gain` verifies it on your GPU'
    )
    with pytest.warns(UserWarning, match=told):
        assert not takes(silent=True)  # which is about what a kernel refuses
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not takes()
        assert takes('mosaic_gpu')  # by name
        assert not takes('chunked')
        monkeypatch.setenv(cards.TRUST, '1')
        assert takes()
        for no in ('0', 'false', ''):
            monkeypatch.setenv(cards.TRUST, no)
            assert not takes()
    with pytest.raises(ValueError, match="implementation 'mosaic_gpu' cannot run here: too wide"):
        takes('mosaic_gpu', 'too wide')


def test_a_verified_kernel_runs_without_a_word(copy, hopper):
    shipped(copy, made())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert takes()
        assert not takes(refusal='too wide', silent=True)
    with pytest.warns(UserWarning, match="runs 'chunked' in place of 'mosaic_gpu': too wide"):
        assert not takes(refusal='too wide')


def test_another_jax_is_a_warning_and_no_refusal(copy, hopper):
    shipped(copy, made(jax='0.11.9'))
    with pytest.warns(UserWarning, match=rf'verified with jax 0\.11\.9, not with jax {jax.__version__}'):
        assert takes()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert takes()


@pytest.mark.parametrize('traced', [False, True])
def test_a_warning_names_the_line_of_who_calls_the_kernel(copy, hopper, monkeypatch, traced):
    checks = os.path.dirname(jaxtyping.__file__)  # stand between, in tests alone
    monkeypatch.setattr(dispatch, 'PASSED_OVER', (*dispatch.PASSED_OVER, checks))
    shipped(copy)
    call = jax.jit(takes) if traced else takes
    with pytest.warns(UserWarning, match='in place of') as told:
        call()
    assert told[0].filename == __file__


def test_on_a_cpu_no_card_is_read(copy, monkeypatch):
    monkeypatch.setattr(cards, 'uncovered', None)
    assert not takes()
