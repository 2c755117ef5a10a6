"""`python -m kernels_pallas.verify`: what it makes of a kernel's cases, without a GPU."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from kernels_pallas import cards, cases, verify
from kernels_pallas.cases import Case

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEVICE = {'device': 'NVIDIA H200', 'compute_capability': '9.0', 'driver': '580.1'}
LIBRARY = {'attention'}  # kernels that an adapter takes from a library
PART = verify.Part('adaptive_gain', 'width32')


def findings(error=1e-7, **last):
    """Of all cases of `PART`; `last` changes the last one's."""
    found = [{'case': case.name, 'errors': {'output 0': error, 'output 1': error / 2}} for case in verify.chosen(PART)]
    return [{'sources': cards.source_hash(PART.kernel)}, *found[:-1], found[-1] | last]


def card(found, ended=''):
    return verify.card(PART, found, ended, 'test', DEVICE)


def test_a_card_says_verified_only_if_every_case_was_right():
    good = card(findings())
    assert good.outcome == cards.VERIFIED and good.current and good.counts and good.major == 9
    assert set(good.cases) == {case.name for case in verify.chosen(PART)} and set(good.cases.values()) == {1e-7}
    name = verify.chosen(PART)[-1].name
    wrong = card(findings(failed=f'{name}: output 0 is off by 6.8e-01'))
    assert wrong.outcome == f'fails: {name}: output 0 is off by 6.8e-01' and not wrong.counts
    crashed = card(findings()[:2], 'exit code -11: Fatal Python error: Segmentation fault')
    assert crashed.outcome == 'crashes: exit code -11: Fatal Python error: Segmentation fault'
    illegal = [*findings()[:2], {'case': 'x', 'crashed': 'JaxRuntimeError: CUDA_ERROR_ILLEGAL_INSTRUCTION'}]
    assert card(illegal, 'exit code 70').outcome == 'crashes: x: JaxRuntimeError: CUDA_ERROR_ILLEGAL_INSTRUCTION'


def test_what_was_not_shown_makes_no_card():
    """Neither good nor bad: cases that did not run, a full GPU, sources that changed meanwhile, another kind of GPU."""
    assert card(findings()[:-1]) is None
    assert card([*findings()[:2], {'case': 'x', 'crashed': 'JaxRuntimeError: RESOURCE_EXHAUSTED: 9 GiB'}]) is None
    assert card([*findings(), {'sources': 'of an edited file'}]) is None
    refused = [{'case': case.name, 'refused': 'it needs more'} for case in verify.chosen(PART)]
    assert card([findings()[0], *refused]) is None
    assert card([*findings()[:-1], refused[-1]]).outcome == cards.VERIFIED  # some cases are not for this GPU


def test_what_is_for_no_gpu_of_this_kind_is_not_run(monkeypatch):
    from kernels_pallas import platform

    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    monkeypatch.setattr(platform, 'compute_capability', lambda: (9, 0))
    refused = {part.kernel: verify.refusal(part) for part in verify.parts(cards.kernels()) if verify.refusal(part)}
    assert set(refused) <= LIBRARY and all(
        'tokamax' in reason or 'cuDNN' in reason for reason in refused.values()
    )  # where they are not installed
    monkeypatch.setattr(platform, 'compute_capability', lambda: (8, 0))
    refusing = [part for part in verify.parts(cards.kernels()) if verify.refusal(part)]
    scans = {part.variant for part in refusing if part.kernel == 'selective_scan'}
    assert scans == {'scaled'}
    others = {part.kernel for part in refusing if part.variant not in scans}
    assert others == {'adaptive_gain', 'causal_conv1d', 'grouped_matmul', 'ssd'} | LIBRARY
    assert 'it needs compute capability 9.0 or newer' in verify.refusal(PART)


def test_times_go_to_the_cards_of_their_variants_and_of_this_gpu():
    mine = card(findings())
    other, older = (dataclasses.replace(mine, **values) for values in ({'device': 'NVIDIA H100'}, {'sources': 'old'}))
    times = {'forward': 1.0, 'forward_floor': 0.5, 'both': 6.0, 'both_floor': 2.0, 'xla_both': 60.0}
    found = [{'timed': 'B8', 'variant': 'width32', 'times': times}]
    (timed,) = verify.with_times([mine, other, older], found, 'NVIDIA H200')
    assert timed.times == {'B8': times}
    assert verify.with_times([timed], [], 'NVIDIA H200')[0].times == {'B8': times}  # not lost where none were taken
    assert verify.described(times) == (
        'forward 1.000 ms (2.00 of the floor), both 6.000 ms (3.00 of the floor, XLA 60.000)'
    )
    assert verify.line(mine).startswith('adaptive_gain    width32    verified; 4 cases, errors to 1.0e-07')


def test_last_words_are_the_telling_ones():
    fault = [
        'Fatal Python error: Segmentation fault',
        '',
        'Thread 0x0 (most recent call first):',
        'Extension modules: a',
    ]
    assert verify.last_words(fault) == 'Fatal Python error: Segmentation fault'
    error = ['jax.errors.JaxRuntimeError: INTERNAL: CUDA_ERROR_ILLEGAL_INSTRUCTION', '', 'at exit: leaked']
    assert verify.last_words(error).startswith('jax.errors.JaxRuntimeError: INTERNAL')
    assert verify.last_words(['one', 'two ']) == 'two' and verify.last_words([]) == ''


def test_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / 'findings'
    assert verify.read_findings(path) == []
    path.write_text('{"case": "a"}\n{"case": "b", "err')
    assert verify.read_findings(path) == [{'case': 'a'}]


def test_every_variant_that_a_call_may_run_has_cases_and_small_ones_for_the_interpreter():
    expected = {
        'adaptive_gain': {'width16', 'width32', 'diagonal16', 'diagonal32', 'diagonal64'},
        'attention': {'causal64', 'causal128', 'packed64', 'packed128', 'cudnn', 'cudnn_wide'},
        'grouped_matmul': {'bfloat16'},
        'causal_conv1d': {'silu', 'linear'},
        'selective_scan': {'scan', 'wide', 'sliced', 'kept', 'prior', 'readout', 'scaled'},
        'ssd': {'keys64', 'keys128'},
    }
    for kernel, variants in expected.items():
        chosen, timed = cases.of(kernel)
        assert {case.variant for case in chosen} == variants
        assert {case.variant for case in timed} <= variants and timed
        assert any(case.small for case in chosen) or kernel in LIBRARY  # which has nothing to interpret
        assert len({case.name for case in chosen}) == len(chosen)
    parts = verify.parts(cards.kernels())
    assert {(part.kernel, part.variant) for part in parts} == {(k, v) for k, vs in expected.items() for v in vs}
    assert [len(verify.chosen(part)) for part in parts] == sorted((len(verify.chosen(p)) for p in parts), reverse=True)


def planted(kernel):
    """A case whose oracle is a product of two arrays."""
    draw = lambda: {'a': jnp.arange(1.0, 5), 'b': jnp.ones(4)}
    oracle = lambda arrays: (arrays['a'] * arrays['b'],)
    return Case('planted', 'planted', draw, kernel, oracle, lambda: None, True)


def test_a_case_compares_outputs_gradients_and_bits():
    assert max(cases.check(planted(lambda arrays, _: (arrays['a'] * arrays['b'],))).values()) < 1e-7
    with pytest.raises(
        cases.Mismatch, match=r'output 0 is off by 1\.0e-02; gradient of a is off by 1\.0e-02'
    ) as caught:
        cases.check(planted(lambda arrays, _: (1.01 * arrays['a'] * arrays['b'],)))
    assert caught.value.errors['gradient of b'] == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(cases.Mismatch, match='output 0 is off by nan'):
        cases.check(planted(lambda arrays, _: (arrays['a'] * jnp.nan,)))
    draws = iter(range(1, 10))
    drifting = lambda arrays, _: (arrays['a'] * arrays['b'] * (1 + 2e-7 * next(draws)),)
    with pytest.raises(cases.Mismatch, match='the same call gave other bits'):
        cases.check(planted(drifting), interpret='eager')


def test_a_wrong_case_lets_the_others_go_on_and_a_crash_does_not(monkeypatch, tmp_path):
    def broken(arrays, interpret):
        raise RuntimeError('CUDA_ERROR_ILLEGAL_INSTRUCTION')

    good, wrong = (lambda arrays, _, by=by: (by * arrays['a'] * arrays['b'],) for by in (1.0, 1.5))
    monkeypatch.setattr(cards, 'source_hash', lambda kernel, variant='': 'hash')
    part, said = verify.Part('any', 'planted'), []
    monkeypatch.setattr(cases, 'of', lambda kernel: ([planted(wrong), planted(good)], []))
    assert not verify.run_part(part, said.append)
    assert said[0] == {'sources': 'hash'} and 'output 0 is off by' in said[1]['failed'] and 'failed' not in said[2]
    said.clear()
    assert verify.run_part(part, said.append, share=(1, 2)) and len(said) == 2
    said.clear()
    monkeypatch.setattr(cases, 'of', lambda kernel: ([planted(broken), planted(good)], []))
    with pytest.raises(RuntimeError):
        verify.run_part(part, said.append)
    assert said[-1]['crashed'] == 'RuntimeError: CUDA_ERROR_ILLEGAL_INSTRUCTION'
    codes = [
        verify.run_as_process(tmp_path / 'found', lambda say, run=run: run()) for run in (lambda: True, lambda: False)
    ]
    assert codes == [0, verify.WRONG]
    assert verify.run_as_process(tmp_path / 'found', lambda say: broken(None, None)) == verify.BROKE_OFF


def test_cases_are_read_without_starting_a_device():
    """Whoever starts processes that want the GPU must not hold it."""
    read = 'from kernels_pallas import verify; verify.standing()'
    code = f'{read}; from jax._src import xla_bridge; print(xla_bridge._backends)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == '{}\n', done.stderr


def run(*arguments):
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-m', 'kernels_pallas.verify', *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd='/')


def test_without_a_gpu_it_says_so():
    done = run()
    assert (done.returncode, done.stderr) == (2, 'error: JAX sees no NVIDIA GPU here, only cpu\n')


def test_bad_arguments_are_refused(capsys):
    assert verify.main(['softmax']) == 2
    assert capsys.readouterr().err == (f"error: no kernel 'softmax'; there are {', '.join(cards.kernels())}\n")
    assert verify.main(['--jobs', '0']) == 2
    assert capsys.readouterr().err == 'error: --jobs 0 must be at least 1\n'
    with pytest.raises(SystemExit, match='2'):
        verify.main(['--jobs', 'many'])
