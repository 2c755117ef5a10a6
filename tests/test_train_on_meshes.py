"""A whole run on several devices, stopped and gone on with on others."""

import signal

import pytest

from mixcon_jax.errors import Exit
from mixcon_jax.train import train
from tests.test_resume import outcome
from tests.test_train import small_config, stop_at


@pytest.mark.slow
def test_experts_and_widths_on_several_devices_stop_and_go_on_on_another_mesh(tmp_path, monkeypatch, capsys):
    """Rows, experts and channels over two devices each; then parameters over two, tokens over four."""
    options = {'model__pattern': ('mamba+moe',), 'model__attention__num_kv_heads': 2}
    first = {'mesh__data': 2, 'mesh__expert': 2, 'mesh__tensor': 2}
    then = {'mesh__data': 1, 'mesh__fsdp': 2, 'mesh__context': 4}
    train(small_config(tmp_path, **options, mesh__data=1, mesh__context=8), tmp_path / 'whole')
    with monkeypatch.context() as patch:
        stop_at(patch, 5, signal.SIGTERM)
        assert train(small_config(tmp_path, **options, **first), tmp_path / 'run').exit_code == Exit.STOPPED
    assert 'experts/expert x embed x mlp/tensor: 2 arrays' in capsys.readouterr().out
    assert train(small_config(tmp_path, **options, **then), tmp_path / 'run').exit_code == Exit.DONE
    for ours, theirs in zip(outcome(tmp_path / 'run')[:-1], outcome(tmp_path / 'whole')[:-1], strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-3)
