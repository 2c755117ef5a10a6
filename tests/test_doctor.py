"""`mixcon doctor`: a screen of what works, on a machine without a GPU and as if there were one."""

import dataclasses
import io
import re
import sys
import types

import jax
import pytest

from kernels_pallas import cards, platform, tokamax, verify
from mixcon_jax import doctor
from mixcon_jax.errors import UserError


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A GPU, no card of any kernel, and no library of kernels."""
    monkeypatch.setattr(tokamax, '_missing', lambda module: 'tokamax is not installed')
    monkeypatch.setattr(platform, 'platform', lambda: 'gpu')
    monkeypatch.setattr(platform, 'compute_capability', lambda: (9, 0))
    monkeypatch.setattr(platform, 'device', lambda: types.SimpleNamespace(device_kind='NVIDIA H100'))
    monkeypatch.setattr(cards, 'shipped', lambda kernel: [])
    monkeypatch.setenv(cards.FOLDER, str(tmp_path))
    monkeypatch.delenv(cards.TRUST, raising=False)
    cards.forget()
    yield tmp_path
    cards.forget()


@pytest.mark.slow
def test_without_a_gpu_a_screen_says_what_works():
    lines: list[str] = []
    assert doctor.doctor(say=lines.append) == 0
    text = '\n'.join(lines)
    assert len(lines) <= 24 and max(map(len, lines)) < 200
    for words in (
        r'^machine    \d+ cores, \d+ GiB of memory, Python 3\.',
        r'\d+ GiB free for ',
        rf'^libraries  jax {re.escape(jax.__version__)}, ',
        r'extra gpu:         (not )?installed',
        r'^devices    \d+ x cpu',
        r"^kernels    without a GPU, XLA's forms of them run",
        r'selective_scan  ',
        r'^training   20 steps of a MixCon with [\d,]+ parameters: loss [\d.]+ to [\d.]+',
        r'compiled in \d+ s, then \d+ ms a step',
    ):
        assert re.search(words, text, re.MULTILINE), words
    assert 'verifies these kernels' not in text


def test_training_that_fails_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr(sys, 'executable', '/bin/false')
    lines: list[str] = []
    assert doctor.train(lines.append) == 1
    assert lines == ['training   FAILS: exit code 1']


def test_a_jax_that_does_not_start_is_said_in_a_line(monkeypatch):
    def broken():
        raise AssertionError

    monkeypatch.setattr(jax, 'devices', broken)
    monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
    lines: list[str] = []
    assert doctor.doctor(say=lines.append) == 1
    assert (
        lines[0].startswith('machine')
        and lines[-1] == 'devices    FAIL: AssertionError: JAX does not start, with JAX_PLATFORMS=cuda'
    )


def test_kernels_that_do_not_run_are_listed_with_the_reason(hopper, monkeypatch):
    adapted = [line for line in doctor.kernels() if ' attention ' in line]
    library = [line for line in adapted if ' cudnn' not in line]
    assert all('not run: cuDNN cannot be found' in line for line in adapted if ' cudnn' in line)
    ours = [line for line in doctor.kernels() if line not in adapted]
    assert library and all('not run: tokamax is not installed' in line for line in library)
    assert ours and all('not run: no GPU of compute capability 9.x has verified' in line for line in ours)
    sample = cards.Card('', '', cards.VERIFIED, 'NVIDIA H100', '9.0', '', jax.__version__, '', '', '', '')
    good = dataclasses.replace(
        sample, kernel='causal_conv1d', variant='silu', sources=cards.source_hash('causal_conv1d')
    )
    cards.write(hopper / 'causal_conv1d.json', [good])
    cards.forget()
    (line,) = (line for line in doctor.kernels() if 'silu' in line)
    assert 'verified, runs by default' in line
    monkeypatch.setenv(cards.TRUST, '1')
    assert sum('runs, unverified, as MIXCON_TRUST_UNVERIFIED is set' in line for line in doctor.kernels()) == 16


def test_verification_is_offered_and_done_if_wanted(hopper, monkeypatch):
    asked: list[tuple] = []
    monkeypatch.setattr(verify, 'verify', lambda names, folder, jobs, times: asked.append((names, folder)) or True)
    said: list[str] = []
    monkeypatch.setattr('sys.stdin', io.StringIO('y\n'))  # no terminal: nobody is asked
    assert doctor.offer(False, said.append) == 0 and not asked
    command = '`python -m kernels_pallas.verify adaptive_gain causal_conv1d grouped_matmul selective_scan ssd`'
    assert said[0].startswith(f'next       {command} verifies these kernels on this GPU')
    assert doctor.offer(True, said.append) == 0
    assert asked == [(['adaptive_gain', 'causal_conv1d', 'grouped_matmul', 'selective_scan', 'ssd'], hopper)]
    monkeypatch.setattr(verify, 'verify', lambda *args, **kwargs: False)
    assert doctor.offer(True, said.append) == 1
    monkeypatch.setattr(platform, 'compute_capability', lambda: (8, 0))
    said.clear()
    doctor.offer(False, said.append)
    assert '`python -m kernels_pallas.verify selective_scan`' in said[0]  # the others are not for such a GPU
    assert sum('it needs compute capability 9.0' in line for line in doctor.kernels()) == 7


def test_nothing_can_be_verified_without_a_gpu():
    with pytest.raises(UserError, match='JAX sees no NVIDIA GPU here, only cpu'):
        doctor.doctor(verify_now=True)
