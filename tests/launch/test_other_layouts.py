"""A run that several processes saved goes on with other numbers of processes and devices, and the data with it."""

import shutil
import signal

import numpy as np
import pytest

from mixcon_jax.runs.records import last, read
from mixcon_jax.train import train
from tests.launch.launching import finish, small_config, wait_until
from tests.launch.test_across_processes import HYBRID, assert_same_run, start
from tests.launch.test_failures import records_of
from tests.tiny import outcome


@pytest.mark.slow
def test_saved_by_two_of_four_devices_it_goes_on_on_any_others(tmp_path):
    """Parameters and tokens are shared out over both. The data is exactly the same; losses are so up to rounding, and
    on the same layout bit for bit."""
    mesh = {'mesh__data': 1, 'mesh__fsdp': 2, 'mesh__tensor': 2, 'mesh__context': 2}
    options = {'train__steps': 14, 'checkpoint__every': 5, 'log__every': 1}
    config = small_config(tmp_path, **options, **HYBRID, **mesh)
    finish(start(tmp_path, config, 'whole', 2, 4))
    launcher = start(tmp_path, config, 'stopped', 2, 4)
    stopped = tmp_path / 'stopped'
    wait_until(launcher, lambda: len(records_of(stopped, 'train')) > 5)
    launcher.send_signal(signal.SIGTERM)
    finish(launcher, code=75)
    step = last(read(stopped / 'metrics.jsonl'), kind='run')['step']
    assert 5 < step < 14

    others = {
        '2x4': (2, 4, mesh),
        '1x8': (1, 8, {'mesh__data': 1, 'mesh__fsdp': 4, 'mesh__tensor': 2}),
        '2x2': (2, 2, {'mesh__data': 1, 'mesh__context': 4}),
        '4x2': (4, 2, {'mesh__data': 2, 'mesh__expert': 2, 'mesh__tensor': 2}),
    }
    whole = tmp_path / 'whole'
    for name, (processes, each, axes) in others.items():
        shutil.copytree(stopped, tmp_path / name)
        changed = small_config(tmp_path, **options, **HYBRID, **axes)
        if processes == 1:
            assert train(changed, tmp_path / name).exit_code == 0
        else:
            assert f'going on after step {step}' in finish(start(tmp_path, changed, name, processes, each))
        for key in ('step', 'tokens'):
            ours, wanted = ([r[key] for r in records_of(run, 'train')] for run in (tmp_path / name, whole))
            np.testing.assert_array_equal(ours, wanted, err_msg=name)
        assert_same_run(tmp_path / name, whole)
    assert outcome(tmp_path / '2x4') == outcome(whole)
