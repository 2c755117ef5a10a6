"""A run that an earlier version began, before layers had files and options of their own, goes on here.

``tests/fixtures/run_before_layers.tar.xz`` holds its directory after two steps: every kind of layer, experts with a
routing bias, a synthetic task. What that version went on to is written down below.
"""

import tarfile

import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax.reports import runs
from mixcon_jax.runs.records import last, read
from mixcon_jax.train import train
from tests.tiny import ROOT

LOSS, HELDOUT = 3.4372096, 3.418959617614746  # of step 4, as that version went on


@pytest.fixture
def older(tmp_path):
    with tarfile.open(ROOT / 'tests' / 'fixtures' / 'run_before_layers.tar.xz') as archive:
        archive.extractall(tmp_path / 'run', filter='data')
    return tmp_path / 'run'


def experiment(steps):
    """The experiment's file of then."""
    config = configs.default()
    config.model.update(dim=8, vocab_size=32, pattern=('attention+mlp', 'mamba+moe', 'conba|moe'))
    config.model.attention.update(num_heads=2, num_kv_heads=1)
    config.model.ssm.update(d_state=2, dt_rank=1)
    config.model.conba.update(head_dim=8, taps=(1, 2))
    config.model.mlp.hidden_dim = 8
    config.model.moe.update(num_experts=2, top_k=1, balance='bias')
    config.data.sources = ('synthetic:induction',)
    config.data.seq_len = 16
    config.data.synthetic.update(symbols=8, eval_rows=8)
    config.optim.update(warmup_steps=2, schedule='constant')
    config.train.update(steps=steps, batch_size=4)  # it had chunks of 64 tokens in the loss
    config.eval.every = 2
    config.checkpoint.update(every=2)
    config.log.update(every=1, tensorboard=False)
    config.mesh.update(data=4, context=2)  # the devices that tests have; it had one
    return config


def test_it_is_read_and_done_as_far_as_it_was_to_go(older, capsys):
    assert runs.ReportedRun(older).state == 'done'
    assert train(experiment(2), older).exit_code == 0
    assert 'done after 2 steps' in capsys.readouterr().out


@pytest.mark.slow
def test_it_goes_on_as_the_earlier_version_did(older):
    """To rounding, which differs from processor to processor."""
    result = train(experiment(4), older)
    assert (result.exit_code, result.step) == (0, 4)
    records = read(older / 'metrics.jsonl')
    assert [record['step'] for record in records if record['kind'] == 'train'] == [1, 2, 3, 4]
    np.testing.assert_allclose(last(records, kind='train')['loss'], LOSS, rtol=2e-6)
    np.testing.assert_allclose(last(records, kind='final')['loss'], HELDOUT, rtol=2e-6)
