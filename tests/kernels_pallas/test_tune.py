"""The tuning tool, but for the times: candidates, the choice, the table, what is passed over, errors."""

import configparser
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from kernels_pallas import tune
from kernels_pallas.selective_scan import mosaic_gpu
from kernels_pallas.selective_scan.mosaic_gpu import tuning
from kernels_pallas.selective_scan.mosaic_gpu.tuning import Settings
from tests.kernels_pallas import interpreted

ROOT = pathlib.Path(__file__).resolve().parents[2]
CURRENT, OTHER, THIRD = Settings(32, 2, 16, 4), Settings(16, 2, 16, 4), Settings(32, 2, 8, 4)


def test_candidates_begin_with_the_current_settings_and_fit_the_kernels():
    forward = tune.forward_candidates(CURRENT)
    backward = tune.backward_candidates(CURRENT, OTHER)
    assert forward[0] == backward[0] == CURRENT
    assert backward[1] == OTHER
    for candidates in (forward, backward):
        assert len(candidates) == len(set(candidates)) > 6
        for c in candidates:
            assert c.forward_tile % c.unroll == c.backward_tile % c.unroll == c.backward_tile % c.stretch == 0
            assert c.stretch < c.backward_tile
            assert c.forward_tile % c.backward_tile == 0 or c.backward_tile % c.forward_tile == 0
    # One pass at a time.
    assert {(c.backward_tile, c.stretch) for c in forward} == {(16, 4)}
    assert {(c.forward_tile, c.unroll) for c in backward[1:]} == {(16, 2)}


@pytest.mark.parametrize(
    'seconds, expected',
    [
        ({CURRENT: 1.0, OTHER: 0.97, THIRD: 0.95}, THIRD),
        ({CURRENT: 1.0, OTHER: 0.99, THIRD: 0.985}, CURRENT),  # under 2 %
        ({CURRENT: 1.0, OTHER: 1.2}, CURRENT),
        ({OTHER: 3.0, THIRD: 2.99}, THIRD),  # the current settings did not run
    ],
)
def test_the_fastest_is_chosen_unless_it_saves_too_little(seconds: dict[Settings, float], expected: Settings):
    assert tune.choose(CURRENT, seconds) == expected


def test_no_candidate_that_ran_is_an_error():
    with pytest.raises(ValueError, match='none of the candidates ran'):
        tune.choose(CURRENT, {})


def test_the_backward_pass_is_tuned_with_the_chosen_forward_pass(capsys: pytest.CaptureFixture):
    """By times that fall with the forward tile and have their best at backward tile 8; one candidate fails."""
    asked = []

    def measure(candidates, gradient):
        asked.append(list(candidates))
        timings = tune.Timings()
        for c in candidates:
            if (c.backward_tile, c.stretch) == (32, 8):
                timings.refused[c] = 'too much shared memory'
            else:
                timings.seconds[c] = (abs(c.backward_tile - 8) if gradient else 0) + 1 / c.forward_tile + c.unroll
        return timings

    chosen = tune.tune(CURRENT, measure)
    assert asked == [tune.forward_candidates(CURRENT), tune.backward_candidates(CURRENT, Settings(64, 1, 16, 4))]
    assert chosen == Settings(64, 1, 8, 4) or chosen == Settings(64, 1, 8, 2)
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(' current') for line in printed) == 2
    assert sum(line.endswith(' chosen') for line in printed) == 2
    assert sum(line.endswith('passed over: too much shared memory') for line in printed) == 1
    (current,) = (line for line in printed[: len(asked[0]) + 2] if line.endswith(' current'))
    assert current.split()[-2] == '1.000'


def test_what_fails_or_differs_is_passed_over():
    """A candidate that raises, one with another result, one with NaN, and sums in another order."""
    x = jnp.linspace(0.5, 1.5, 1000)
    functions = {
        CURRENT: lambda x: {'y': jnp.sin(x)},
        OTHER: lambda x: {'y': jnp.sin(x) * (1 + 1e-6)},
        THIRD: lambda x: {'y': jnp.sin(x).at[7].set(0.0)},
        Settings(8, 1, 8, 2): lambda x: {'y': jnp.sin(x).at[7].set(jnp.nan)},
        Settings(8, 2, 8, 2): lambda x: {'y': x.reshape(7, 7)},
    }
    timings = tune.time_in_turns(functions.__getitem__, list(functions), (x,), 1e-4)
    assert set(timings.seconds) == {CURRENT, OTHER}
    assert all(0 < seconds < 10 for seconds in timings.seconds.values())
    assert set(timings.refused) == set(functions) - {CURRENT, OTHER}
    assert timings.refused[THIRD].startswith('its result differs by ')
    assert timings.refused[Settings(8, 1, 8, 2)] == 'its result differs by nan'
    assert timings.refused[Settings(8, 2, 8, 2)].startswith('TypeError: cannot reshape')


def test_a_first_candidate_that_gives_nan_is_no_reference():
    functions = {CURRENT: lambda x: x * math.nan, OTHER: lambda x: x + 1}
    timings = tune.time_in_turns(functions.__getitem__, list(functions), (jnp.ones(3),), 1e-4)
    assert set(timings.seconds) == {OTHER}


def test_the_table_keeps_its_other_entries(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / 'tuned.json'
    tuning.update(path, 'hopper', {tuning.key(16, 2, False): OTHER, tuning.key(16, 4, False): CURRENT})
    tuning.update(path, 'ampere', {tuning.key(16, 2, False): CURRENT})
    tuning.update(path, 'hopper', {tuning.key(16, 2, False): THIRD})
    assert [entry.name for entry in tmp_path.iterdir()] == ['tuned.json']
    assert set(json.loads(path.read_text())['hopper']) == {'N16-16bit', 'N16-32bit'}
    monkeypatch.setattr(tuning, 'TABLE', path)
    assert tuning.settings('hopper', 16, 2, False) == THIRD
    assert tuning.settings('hopper', 16, 4, False) == CURRENT
    assert tuning.settings('ampere', 16, 2, False) == CURRENT
    assert tuning.settings('hopper', 8, 2, False) == tuning.FALLBACK['hopper']


def test_a_table_that_cannot_be_written_stays(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / 'tuned.json'
    tuning.update(path, 'hopper', {'a': CURRENT})
    before = path.read_text()
    monkeypatch.setattr(json, 'dump', lambda *_, **__: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        tuning.update(path, 'hopper', {'a': OTHER})
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ['tuned.json']


def test_cases_fill_the_gpu_and_have_the_keys_that_the_scan_asks_for():
    found = tune.cases(tune.parse(['--states', '16', '12', '24']), cores=132)
    assert [case.key for case in found] == ['N16-16bit', 'N16-32bit', 'N24-16bit', 'N24-32bit']
    assert {(case.batch, case.length, case.channels) for case in found} == {(8, 4096, 4096)}
    (case,) = tune.cases(tune.parse(['--dtype', 'float32', '--states', '8', '--readout', '--batch', '3']), cores=108)
    assert (case.key, case.batch) == ('N16-32bit-readout', 3)
    assert tune.cases(tune.parse(['--channels', '65536']), cores=20)[0].batch == 1


def test_without_a_gpu_one_line_says_so(tmp_path: pathlib.Path):
    """Also where JAX's plugin for GPUs is installed and finds none."""
    environment = {key: value for key, value in os.environ.items() if key != 'JAX_PLATFORMS'}
    run = subprocess.run(
        [sys.executable, '-m', 'kernels_pallas.tune', '--out', str(tmp_path / 'tuned.json')],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if run.returncode == 0:
        pytest.skip('there is a GPU')
    assert run.returncode == 2
    assert run.stdout == ''
    (line,) = run.stderr.splitlines()
    assert line.startswith('error: selective_scan cannot be tuned here: it needs an NVIDIA GPU, and this is for cpu')
    assert not list(tmp_path.iterdir())


def test_a_table_in_no_folder_is_refused_before_anything_is_timed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(mosaic_gpu, 'unsupported', lambda *_: None)
    assert tune.main(['--out', str(tmp_path / 'none' / 'tuned.json')]) == 2
    assert 'cannot be written to; name another table with --out' in capsys.readouterr().err


@pytest.mark.parametrize('gradient', [False, True])
def test_the_scan_is_timed_as_it_would_be_on_a_gpu(gradient: bool, monkeypatch: pytest.MonkeyPatch):
    """Interpreted, a scan of every candidate size gives the first one's result."""
    scan = functools.partial(mosaic_gpu.scan, generation='hopper', cores=132, interpret=interpreted.parameters())
    monkeypatch.setattr(tune.mosaic_gpu, 'scan', scan)
    monkeypatch.setattr(tune, 'queued', lambda run, args, calls: 1.0)
    candidates = [Settings(16, 2, 8, 4), Settings(8, 1, 16, 4)]
    timings = tune.measure_scan(tune.Case(8, 'float32', False, 1, 16, 128), candidates, gradient)
    assert timings == tune.Timings(dict.fromkeys(candidates, 1.0), {})


def test_the_table_is_part_of_the_package():
    """Whoever tunes before building a wheel ships the result."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    package = tuning.TABLE.parent.relative_to(ROOT).as_posix().replace('/', '.')
    assert parser['options.package_data'][package] == tuning.TABLE.name
