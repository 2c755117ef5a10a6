"""Sweeps: failures stay with their case, an interrupted sweep goes on bit for bit, and nothing is left behind."""

import dataclasses
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch import processes
from launch.processes import Share, Signals
from launch.sweep import sweep
from launch.sweep.cases import Case, cases
from launch.sweep.estimate import Estimate, Sizes
from mixcon_jax import config as configs
from mixcon_jax.runs import saved
from mixcon_jax.runs.records import last, read
from mixcon_jax.runs.run import Run
from tests.launch.launching import all_end, children_of, finish, launch, small_config, wait_until, write_sweep

CASES = """
def sweep(arg=None):
    yield {'name': 'short', 'train.steps': 6}
    if arg != 'good':
        yield {'name': 'bad', 'model.vocab_size': 280}
    yield {'name': 'long', 'train.steps': 150}
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with experiment.py, whose sweep() is CASES."""
    folder = tmp_path_factory.mktemp('sweep')
    write_sweep(folder / 'experiment.py', small_config(folder, log__every=1), CASES)
    return folder


@pytest.fixture(scope='module')
def whole(folder):
    """A sweep of all cases that was not interrupted: its folder and what it printed."""
    return folder / 'whole', finish(start(folder, folder / 'whole'), code=1)


def start(folder, workdir, argument='', *options) -> subprocess.Popen:
    config = f'{folder / "experiment.py"}{argument}'
    return launch('launch.sweep', '--config', config, '--workdir', workdir, *options)


def done(run) -> dict:
    """The last record of a run that is done."""
    record = last(read(run / 'metrics.jsonl'), kind='run')
    assert record is not None and record['event'] == 'done'
    return record


def test_a_traceback_ends_with_the_projects_own_frames_and_the_error(tmp_path):
    (tmp_path / 'log').write_text(
        'Traceback (most recent call last):\n'
        '  File "/home/me/mixers/mine.py", line 3, in __call__\n    y = x + z\n        ~~^~~\n'
        '  File "/home/me/lib/site-packages/jax/numpy.py", line 9, in add\n    raise error\n    ^^^^^\n'
        'TypeError: incompatible shapes\n\n--------------------\n'
        'For simplicity, JAX has removed its internal frames from the traceback of the following exception.\n'
    )
    lines = processes.last_lines(tmp_path / 'log', 3)
    assert lines == ['    y = x + z', '        ~~^~~', 'TypeError: incompatible shapes']


# ----- whole sweeps -------------------------------------------------------------------------------------------------


def test_a_failing_case_stops_no_other_and_says_why(whole):
    workdir, output = whole
    for name, steps in (('short', 6), ('long', 150)):
        record = done(workdir / name / 'seed-0')
        assert record['step'] == steps
        line = next(line for line in output.splitlines() if line.startswith(f'{name}/seed-0 done in'))
        assert f'loss {record["loss"]:.4f} · {record["bits_per_byte"]:.4f} bits per byte' in line
    assert 'bad/seed-0 failed' in output
    report = output[output.index('case ') :]
    assert 'the tokenizer has 300 tokens but model.vocab_size=280' in report
    log = (workdir / 'bad' / 'seed-0.log').read_text()
    assert log.startswith('$ mixcon train --config') and 'model.vocab_size=280' in log
    assert not (workdir / 'bad' / 'seed-0').exists()


@pytest.mark.slow  # as one run does in tests/test_resume.py
def test_an_interrupted_sweep_goes_on_bit_for_bit(folder, whole):
    workdir = folder / 'parts'
    launcher = start(folder, workdir, ':good')
    metrics = workdir / 'long' / 'seed-0' / 'metrics.jsonl'
    wait_until(launcher, lambda: len(read(metrics)) > 20)
    children = children_of(launcher.pid)
    assert len(children) == 1
    launcher.send_signal(signal.SIGINT)
    output = finish(launcher, code=75)
    assert all_end(children, 0), 'no orphan'
    assert 'long/seed-0 stopped' in output and 'the same command goes on' in output
    stopped = last(read(metrics), kind='run')
    assert stopped['event'] == 'stopped' and 0 < stopped['step'] < 150
    assert (metrics.parent / 'checkpoints' / str(stopped['step'])).is_dir()

    finished = workdir / 'short' / 'seed-0' / 'metrics.jsonl'
    before = finished.read_bytes(), finished.stat().st_mtime_ns
    output = finish(start(folder, workdir, ':good'))
    assert f'long/seed-0 goes on after step {stopped["step"]} of 150' in output
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before, 'a finished case is not run again'
    assert 'short/seed-0 starts' not in output
    for name in ('short', 'long'):
        expected = done(whole[0] / name / 'seed-0')
        assert done(workdir / name / 'seed-0')['fingerprint'] == expected['fingerprint']
    assert 'done before' in output and f'{expected["bits_per_byte"]:.4f}' in output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a process that its parent has died')
def test_cases_save_and_stop_when_the_launcher_is_killed(folder):
    workdir = folder / 'killed'
    launcher = start(folder, workdir, ':good', '--config.train.max_bad_steps=20')
    metrics = workdir / 'long' / 'seed-0' / 'metrics.jsonl'
    wait_until(launcher, lambda: len(read(metrics)) > 5)
    children = children_of(launcher.pid)
    launcher.kill()
    launcher.communicate()
    assert children and all_end(children)
    assert last(read(metrics), kind='run')['event'] == 'stopped'
    finish(start(folder, workdir, ':good'))


# ----- with other programs in place of training ---------------------------------------------------------------------


@pytest.fixture
def three(folder):
    """Three cases, and a folder for them."""
    return cases(str(folder / 'experiment.py'))


def written(case: Case, workdir, step: int, event: str = 'stopped', speed: float = 0.0, seconds: float = 0.0) -> None:
    """Writes what a run of this case leaves that began, made ``step`` steps, saved them and ended so."""
    run = workdir / case.folder
    for item in (*saved.ARRAYS, 'meta'):
        (run / 'checkpoints' / str(step) / item).mkdir(parents=True)
        (run / 'checkpoints' / str(step) / item / 'manifest.ocdbt').write_text('x')
    contents = {'step': step, 'config': case.config.to_dict()}
    text = json.dumps({'sha256': saved.digest(contents), 'contents': contents})
    (run / 'checkpoints' / str(step) / 'meta' / 'metadata').write_text(text)
    (run / 'config.json').write_text(configs.to_json(case.config))
    scores = {'fingerprint': 'f', 'loss': 1.25, 'perplexity': 3.5, 'bits_per_byte': 0.625, 'tokens': 9, 'bytes': 9}
    records = [
        {'kind': 'run', 'step': 0, 'event': 'started'},
        {'kind': 'train', 'step': step, 'loss': 2.0, 'tokens_per_second': speed},
        {'kind': 'checkpoint', 'step': step},
        {'kind': 'run', 'step': step, 'event': event, 'seconds': seconds} | (scores if event == 'done' else {}),
    ]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))


def run_programs(monkeypatch, cases, workdir, programs, signals=None, jobs: int = 1) -> tuple[int, str]:
    """Runs a sweep whose cases, in turn, run this Python code; returns exit code and output."""
    left = list(programs)

    def start(module, arguments, share, environment, output):
        return subprocess.Popen(
            [sys.executable, '-c', left.pop(0)], stdout=output, stderr=output, start_new_session=True
        )

    monkeypatch.setattr(processes, 'start', start)
    stream = io.StringIO()
    code = sweep.Sweep(cases, workdir, [Share()] * jobs, os.environ, signals or Signals(), stream).run()
    assert not left
    return code, stream.getvalue()


def test_what_ended_a_case_is_told(monkeypatch, three, tmp_path):
    programs = [
        "import os, signal; print('half of it', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
        "print('step 3'); print('error: loss was not finite'); exit(3)",
        "raise MemoryError('of the device')",
    ]
    code, output = run_programs(monkeypatch, three, tmp_path, programs)
    assert code == 1
    assert 'half of it (killed by SIGKILL' in output
    assert re.search(r'bad/seed-0 failed after \d+s: loss was not finite\n', output)
    report = output[output.index('case ') :]
    assert 'Traceback' in report and 'MemoryError: of the device (exit code 1)' in report
    assert str(tmp_path / 'long' / 'seed-0.log') in report


def test_a_case_that_a_signal_reached_is_stopped_not_failed(monkeypatch, three, tmp_path):
    code, output = run_programs(monkeypatch, three[:2], tmp_path, ['exit(75)', 'import os; os.kill(os.getpid(), 15)'])
    assert code == 75
    assert len(re.findall(r'stopped after \d+s, before its first checkpoint', output)) == 2


def test_cases_run_side_by_side_and_are_awaited_after_a_signal(monkeypatch, three, tmp_path):
    """Two of three run at once: each waits for the other's file. After the signal the third does not begin."""
    meet = (
        'import pathlib, signal, time\n'
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('saved', flush=True), exit(75)))\n"
        "pathlib.Path('{0}').touch()\n"
        "while not pathlib.Path('{1}').exists(): time.sleep(0.01)\n"
        "pathlib.Path('{0}-met').touch()\n"
        'time.sleep(60)'
    )
    a, b = tmp_path / 'a', tmp_path / 'b'
    signals = Signals()
    both = lambda: (tmp_path / 'a-met').exists() and (tmp_path / 'b-met').exists()
    after(both, lambda: setattr(signals, 'stop', True))
    programs = [meet.format(a, b), meet.format(b, a)]
    code, output = run_programs(monkeypatch, three, tmp_path, programs, signals, jobs=2)
    assert code == 75
    assert 'stopping: 2 running cases' in output and 'long/seed-0 starts' not in output
    for name in ('short', 'bad'):
        assert (tmp_path / name / 'seed-0.log').read_text().endswith('saved\n')


def test_a_second_interruption_kills(monkeypatch, three, tmp_path):
    stubborn = (
        'import pathlib, signal, time\n'
        f"signal.signal(signal.SIGTERM, lambda *_: pathlib.Path('{tmp_path}/told').touch())\n"
        f"pathlib.Path('{tmp_path}/ready').touch()\n"
        'while True: time.sleep(0.01)'
    )
    signals = Signals()
    after((tmp_path / 'ready').exists, lambda: setattr(signals, 'stop', True))
    after((tmp_path / 'told').exists, lambda: setattr(signals, 'kill', True))
    code, output = run_programs(monkeypatch, three, tmp_path, [stubborn], signals)
    assert code == 130
    assert 'short/seed-0 stopped' in output and 'failed' not in output


def after(moment, action) -> None:
    """Does something from another thread once ``moment()`` has come."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not moment() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_folders_that_hold_something_else_fail_by_themselves(monkeypatch, three, tmp_path):
    """A run of another configuration, a case that another sweep is running, and one that is done."""
    short, _, long = three
    other = short.config.copy_and_resolve_references()
    other.optim.learning_rate = 0.5
    written(dataclasses.replace(short, config=other), tmp_path, 4)
    written(long, tmp_path, 150, 'done', speed=2000.0)
    (tmp_path / 'bad').mkdir()
    with open(tmp_path / 'bad' / 'seed-0.log', 'w') as elsewhere:
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
        code, output = run_programs(monkeypatch, three, tmp_path, [])
    assert code == 1
    assert 'short/seed-0 failed: ' in output and 'holds a run of another configuration (optim.learning_rate' in output
    assert 'bad/seed-0 failed: another sweep is running it' in output
    assert 'long/seed-0   done before  1.2500         0.6250        2k' in output


def test_a_case_that_ended_well_in_a_folder_of_another_run_says_so(monkeypatch, three, tmp_path):
    written(dataclasses.replace(three[0], config=three[1].config), tmp_path / 'made', 4)
    program = f"import shutil; shutil.copytree('{tmp_path}/made', '{tmp_path}/sweep', dirs_exist_ok=True)"
    code, output = run_programs(monkeypatch, three[:1], tmp_path / 'sweep', [program])
    assert code == 1 and re.search(r'failed after \d+s: .*holds a run of another configuration \(model.vocab', output)


# ----- --list -------------------------------------------------------------------------------------------------------


def listed(folder, workdir, capsys, *options) -> list[str]:
    with pytest.raises(SystemExit) as end:
        sweep.main(['--config', str(folder / 'experiment.py'), '--workdir', str(workdir), '--list', *options])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    return output.out.splitlines()


def test_list_shows_states_sizes_and_time(folder, three, tmp_path, capsys):
    """Of 150 steps of 256 tokens 50 are made at 1,000 tokens/s; the case that is done took 2 s for its 6 steps."""
    short, _, long = three
    written(short, tmp_path, 6, 'done', speed=5000.0, seconds=2.0)
    written(long, tmp_path, 50, speed=1000.0, seconds=99.0)
    lines = [line.split() for line in listed(folder, tmp_path, capsys)]
    parameters = f'{Sizes().parameters(short).total:,}'
    assert lines[0] == ['case', 'state', 'parameters', 'tokens', 'time', 'left']
    assert lines[1] == ['short/seed-0', 'done', parameters, '1.54k', '-']
    assert lines[2][:2] == ['bad/seed-0', 'new'] and lines[2][2] != parameters
    # Both have run the same model: the median of 768 tokens/s, start-up included, and 1,000 without.
    assert lines[3] == ['long/seed-0', 'at', 'step', '50', 'of', '150', parameters, '38.4k', '29s']
    assert lines[4][:4] == ['3', 'cases', '1', 'done']
    assert (
        'rough, without start-up and compilation: from the speed of cases that have run here, for other models by'
        in (' '.join(lines[5]))
    )


def test_list_of_a_sweep_that_has_not_begun_makes_nothing(folder, tmp_path, capsys):
    """The estimate comes from a matrix product that a process of its own times."""
    lines = listed(folder, tmp_path / 'none', capsys, '--config.model.pattern=attention+moe')
    assert 'active' in lines[0].split()
    assert [line.split()[1] for line in lines[1:4]] == ['new'] * 3
    assert "of a matrix product's" in lines[5]
    assert not (tmp_path / 'none').exists()


def test_list_shows_what_cannot_run(folder, three, tmp_path, capsys):
    other = three[0].config.copy_and_resolve_references()
    other.optim.learning_rate = 0.5
    written(dataclasses.replace(three[0], config=other), tmp_path, 4, speed=10.0)
    lines = listed(folder, tmp_path, capsys)
    assert lines[1].split()[1] == 'refused'
    assert lines[-1].startswith('short/seed-0: ') and 'another configuration' in lines[-1]


def test_an_estimate_reads_a_run_once_unless_told_to_look_again(monkeypatch, three, tmp_path):
    """At 1,000 tokens/s, 100 steps of 256 tokens take 25.6 s, of another model by its operations; later at 4,000."""
    short, other, long = three
    written(long, tmp_path, 50, speed=1000.0)
    looked, update = [], Run.update
    monkeypatch.setattr(Run, 'update', lambda run: (looked.append(run.metrics_file), update(run))[1])
    sizes = Sizes()
    estimate = Estimate(three, tmp_path, sizes)
    ratio = sizes.flops_per_token(other) / sizes.flops_per_token(long)
    looked.clear()
    assert estimate.seconds(short, 100) == pytest.approx(25.6)
    assert estimate.seconds(other, 100) == pytest.approx(25.6 * ratio)
    assert not looked
    shutil.rmtree(tmp_path / long.folder)
    written(long, tmp_path, 60, speed=4000.0)
    assert estimate.seconds(short, 100) == pytest.approx(25.6)
    estimate.look([long])
    assert estimate.seconds(short, 100) == pytest.approx(6.4)
    assert looked == [tmp_path / long.folder / 'metrics.jsonl']


# ----- arguments and shares -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'options, message',
    [
        (['--jobs', '0'], '--jobs 0 must be at least 1'),
        (['--jobs', '100000'], '--jobs 100000 needs as many CPU cores'),
        (['--stps=3'], 'unknown argument --stps=3; see `python -m launch.sweep --help`'),
        (['--config.train.steps'], 'has no value'),
        (['--config.modle.dim=3'], 'did you mean model.dim'),
        (['--config.model.dim=33'], 'case 0'),
        (['--config', 'experiments/quickstart.py'], 'experiments/quickstart.py has no sweep()'),
        (['--workdir', 'RUN'], 'is the folder of a single run'),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, options, message):
    (tmp_path / 'config.json').write_text(configs.to_json(configs.default()))
    options = [str(tmp_path) if option == 'RUN' else option for option in options]
    with pytest.raises(SystemExit) as end:
        sweep.main(['--config', str(folder / 'experiment.py'), '--workdir', str(tmp_path / 'sweep'), *options])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error
    assert not (tmp_path / 'sweep').exists()
