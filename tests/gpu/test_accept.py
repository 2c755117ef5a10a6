"""The acceptance script: all its stages on the CPU, and what becomes of those that fail, crash or hang."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from kernels_pallas import cards, verify
from mixcon_jax.models import kinds as registered
from tests.gpu.accept import __main__ as accept
from tests.gpu.accept import layers, runner, stages
from tests.gpu.accept.runner import Outcome, Runner, Stage
from tests.models.cases import CASES

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = [name for group in stages.LAYERS for name in group]
CHEAP = ('device', 'kernel:causal_conv1d')  # the others train, or run layers and kernels, as other tests do


@pytest.mark.parametrize('only', [CHEAP, pytest.param((), marks=pytest.mark.slow)], ids=['cheap', 'all'])
def test_every_kind_of_stage_passes_on_the_cpu(tmp_path, only):
    """So that the script does not fail for a typo on the day that there is a GPU."""
    command = [sys.executable, '-m', 'tests.gpu.accept', '--cpu', '--jobs', '2', '--out', str(tmp_path)]
    command += ['--only', *only] if only else []
    flags = ' '.join(flag for flag in os.environ['XLA_FLAGS'].split() if 'device_count' not in flag)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {'XLA_FLAGS': flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads((tmp_path / 'results.json').read_text())['stages']
    assert {stage['state'] for stage in found} == {'passed'}
    kinds = {stage['name'].split(':')[0] for stage in found}
    assert kinds == ({name.split(':')[0] for name in only} or set(stages._STAGES) - {'times', 'tiles'})  # no CPU's
    interpreted = {part.kernel for part in verify.parts(cards.kernels()) if verify.chosen(part, small=True)}
    assert interpreted == set(cards.kernels()) - {'attention'}  # whose forward pass is a library's
    ran = {stage['name'].split(':')[1] for stage in found if stage['name'].startswith('kernel')}
    assert ran == ({'causal_conv1d'} if only else interpreted)
    assert not list((tmp_path / 'cards').glob('*.json')), 'the interpreter is no GPU'
    assert re.search(r'\d+ passed; all figures are in .*results.json', done.stdout)


def test_every_mixer_and_ffn_is_tried_as_a_layer():
    assert len(NAMES) == len(set(NAMES))
    assert not set(registered.names()) - {CASES[name][0] for name in NAMES}


@pytest.mark.parametrize('name', [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_a_layer_in_bfloat16_is_within_its_limit_on_the_cpu(name):
    """By a tenth of it, so that the little that a GPU rounds otherwise does not decide."""
    said = []
    layers.check(name, said.append)
    assert len(said) == 2 and not [found for found in said if 'failed' in found]
    assert said[1]['error'] < 0.9 * layers.KINKED.get(name, layers.TOLERANCE['bfloat16'])


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A runner whose stages are lines of Python."""
    numbers = itertools.count()

    def start(self, stage, wrapper=(), suffix=''):
        seconds = min(stage.seconds, self.left())
        if seconds < runner.LEAST:
            return None
        number = next(numbers)
        findings, log = tmp_path / f'{number}.jsonl', tmp_path / f'{number}{suffix}.txt'
        write = f'import sys, os, time; say = lambda text: print(text, file=open({str(findings)!r}, "a"), flush=True)\n'
        command = [*wrapper, sys.executable, '-c', write + stage.name]
        process = runner._Process(stage, command, findings, log, seconds)
        self._running.add(process)
        return process

    monkeypatch.setattr(Runner, '_start', start)
    monkeypatch.setattr(runner, 'LEAST', 0.5)
    return Runner(tmp_path / 'out', minutes=1, arguments=[])


def saved(run: Runner) -> list[dict]:
    return json.loads((run.folder / 'results.json').read_text())['stages']


def test_what_becomes_of_a_stage(planted, capsys):
    lines = {
        'passed': 'say(\'{"error": 1e-7}\')',
        'failed': 'say(\'{"failed": "off by 1"}\'); sys.exit(1)',
        'crashed': "print('Fatal Python error: what happened'); print('noise', flush=True); os.kill(os.getpid(), 11)",
        'timed out': 'time.sleep(60)',
    }
    found = planted.together([Stage(text, 3 if state == 'timed out' else 30) for state, text in lines.items()], jobs=4)
    assert [outcome.state for outcome in found] == list(lines)
    assert found[2].exit_code == -11 and found[2].why == 'Fatal Python error: what happened'
    assert {stage['state'] for stage in saved(planted)} == set(lines)
    assert accept.conclude(planted) == 1
    printed = capsys.readouterr()
    assert 'off by 1' in printed.out and 'what happened' in printed.out
    assert printed.err.startswith('error: 3 went wrong: ')


def test_a_crash_is_run_again_under_the_sanitizer_where_there_is_one(planted, tmp_path, monkeypatch):
    tool = tmp_path / 'bin' / 'compute-sanitizer'
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "========= Illegal instruction at causal_conv1d_backward"\necho noise\nexit 99\n')
    tool.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tool.parent}{os.pathsep}{os.environ["PATH"]}')
    outcome = planted.run(Stage('os.kill(os.getpid(), 4)', 30))
    assert outcome.state == runner.CRASHED
    assert outcome.sanitizer == ['========= Illegal instruction at causal_conv1d_backward']
    assert planted.run(Stage('sys.exit(70)', 30)).sanitizer == outcome.sanitizer  # how an exception ends a stage
    assert planted.run(Stage('sys.exit(1)', 30)).sanitizer == []  # a wrong number is no crash


def test_gated_stages_wait_until_all_have_compiled_and_go_on_one_by_one(planted, tmp_path):
    note = tmp_path / 'order'
    write = f'open({str(note)!r}, "a").write'
    wait = 'say(\'{"ready": 1}\'); sys.stdin.readline()'
    text = f"time.sleep(%s); {write}('c'); {wait}; {write}('<'); time.sleep(.3); {write}('>')"
    begun = planted.begin([Stage(text % delay, 30) for delay in (0, 0.5, 0.2)])
    assert [outcome.state for outcome in planted.release(begun)] == ['passed'] * 3
    assert note.read_text() == 'ccc<><><>'


def test_one_that_hangs_takes_no_other_along(planted):
    ready = 'say(\'{"ready": 1}\'); sys.stdin.readline(); time.sleep(1.5)'
    begun = planted.begin([Stage(ready, 2.5), Stage('time.sleep(60)', 2), Stage(ready + ' #', 2.5)])
    assert [outcome.state for outcome in planted.release(begun)] == ['passed', runner.SKIPPED, 'passed']


def test_one_that_compiles_for_long_is_left_behind(planted, monkeypatch):
    monkeypatch.setattr(runner, 'TIMED', 1)
    planted.end -= 56
    begun = planted.begin([Stage('time.sleep(60)', 60), Stage('say(\'{"ready": 1}\'); sys.stdin.readline()', 60)])
    assert [outcome.state for outcome in planted.release(begun)] == [runner.SKIPPED, 'passed']
    assert not planted._running


def test_what_runs_ends_with_the_script(planted, tmp_path):
    child = f'import time, os; open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid())); time.sleep(60)'
    ((_, process),) = planted.begin(
        [Stage(f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}])", 30)]
    )
    while not (tmp_path / 'pid').exists() or not (tmp_path / 'pid').read_text():
        assert process._process.poll() is None
        time.sleep(0.05)
    planted.kill()
    time.sleep(0.2)
    status = pathlib.Path('/proc', (tmp_path / 'pid').read_text(), 'status')
    assert not status.exists() or 'zombie' in status.read_text()


def test_stages_that_do_not_fit_are_listed(planted, capsys):
    planted.end -= 58
    planted.run(Stage('time.sleep(30)', 30))  # cut by the end of all
    planted.run(Stage('pass', 30))
    assert [stage['state'] for stage in saved(planted)] == [runner.SKIPPED] * 2
    assert accept.conclude(planted) == 3
    assert 'not run, the time was over: time.sleep(30), pass' in capsys.readouterr().out


def test_cards_of_the_stages(tmp_path, monkeypatch):
    """One card a variant from its processes' findings; times added; only those of the sources here are installed."""
    run, kernel, variant = Runner(tmp_path, 1, []), 'adaptive_gain', 'width32'
    facts = {'device': 'NVIDIA H200', 'compute_capability': '9.0', 'driver': '580.1'}
    names = [case.name for case in verify.chosen(verify.Part(kernel, variant))]
    sources = {'sources': cards.source_hash(kernel)}
    halves = [[sources, *({'case': name, 'errors': {'output 0': 1e-7}} for name in names[i::2])] for i in range(2)]
    stage = f'kernel:{kernel}:{variant}'
    outcome = lambda i, state, found, why='': Outcome(f'{stage}:{i}/2', state, 0, 1.0, found, [], why)
    path = tmp_path / 'cards' / f'{kernel}.json'
    good = [outcome(i, runner.PASSED, halves[i]) for i in range(2)]

    for unfinished in ([good[0]], [good[0], outcome(1, runner.SKIPPED, [])]):
        accept.write_cards(run, unfinished, facts)
        assert not path.exists(), 'nothing was shown of half of the cases'
    accept.write_cards(run, [good[0], outcome(1, runner.CRASHED, halves[1][:-1], 'Segmentation fault')], facts)
    assert cards.read(path)[0].outcome == 'crashes: Segmentation fault after 1 s'
    accept.write_cards(run, good, facts)
    times = {'timed': 'B8', 'variant': variant, 'times': {'forward': 1.0}}
    accept.add_times(run, Outcome(f'times:{kernel}', runner.PASSED, 0, 1.0, [times]), 'NVIDIA H200')
    (made,) = cards.read(path)
    assert made.outcome == cards.VERIFIED and set(made.cases) == set(names) and made.times == {'B8': {'forward': 1.0}}

    package = tmp_path / 'package'
    hashed = cards.source_hash(kernel)
    monkeypatch.setattr(cards, 'source_hash', lambda name, variant='': hashed)
    monkeypatch.setattr(cards, 'kernels', lambda: [kernel])
    monkeypatch.setattr(cards, 'PACKAGE', package)
    assert accept.install(tmp_path) == 0
    assert cards.read(package / kernel / cards.FILE) == [made]
    monkeypatch.setattr(cards, 'source_hash', lambda name, variant='': 'other')
    assert accept.install(tmp_path) == 1
    assert accept.install(tmp_path / 'nothing') == 2


def test_without_a_gpu_it_points_to_the_trial_run(tmp_path):
    command = [sys.executable, '-m', 'tests.gpu.accept', '--out', str(tmp_path), '--only', 'times']
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {'CUDA_VISIBLE_DEVICES': ''}, capture_output=True, text=True
    )
    assert done.returncode == 1 and 'error: JAX does not start on a GPU here' in done.stderr
    assert '--cpu tries the script on the CPU' in done.stderr


def test_bad_arguments_are_refused(capsys):
    for arguments, told in (
        (['--only', 'kernl'], 'no stage is left by --only and --skip; there are kernel, layers, run, speed'),
        (['--only', 'speed', '--skip', ':'], 'no stage is left'),
        (['--jobs', '0'], '--jobs and --minutes must be above 0'),
        (['--minutes', '-1'], '--jobs and --minutes must be above 0'),
    ):
        with pytest.raises(SystemExit, match='2'):
            accept.main(arguments)
        assert told in capsys.readouterr().err
