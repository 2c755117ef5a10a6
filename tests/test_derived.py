"""A run made of another is there as a whole or not at all, and goes on as any run does."""

import errno
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax import derived
from mixcon_jax.data import tokenizer as tokenizers
from mixcon_jax.errors import UserError
from mixcon_jax.host import locks
from mixcon_jax.models import decoder
from mixcon_jax.models.layers import Buffer
from mixcon_jax.runs import readback
from mixcon_jax.runs.checkpoints import Checkpoints, Meta
from mixcon_jax.runs.saved import Damaged
from mixcon_jax.runs.workdir import Workdir
from mixcon_jax.step import make_steps
from mixcon_jax.trees import from_state, named_leaves
from tests.tiny import WORDS, tiny_config
from tests.training import mesh_of


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """A configuration, weights and what else is of a checkpoint."""
    folder = tmp_path_factory.mktemp('corpus')
    config = configs.resolve(configs.validate(tiny_config(folder, model__pattern=('mamba',))))
    _, *states = nnx.split(decoder.create(config.model), nnx.Param, Buffer)
    trees = dict(zip(('params', 'buffers'), map(from_state, states), strict=True))
    return config, trees, Meta(7, {}, tokenizers.train(WORDS, 300).to_json(), ('one',), 99, 2.5)


def test_a_new_run_goes_on_from_its_step_with_a_new_optimizer(parts, tmp_path):
    config, trees, meta = parts
    (tmp_path / 'made').mkdir()  # empty
    (tmp_path / 'link').symlink_to(tmp_path / 'made')
    derived.write(derived.new_folder(tmp_path / 'link'), config, trees, meta, 'runs/a')
    folder = Workdir(tmp_path / 'made')
    assert folder.init_from() == {'source': 'runs/a', 'step': 7}
    assert folder.require_same(config)['step'] == 7
    checkpoints = Checkpoints(folder.checkpoints)
    state, found = checkpoints.restore(make_steps(config, mesh_of(config)).abstract_state)
    checkpoints.close()
    assert (found.data, found.tokens_seen, found.heldout_loss) == (('one',), 99, 2.5)
    for name, value in named_leaves(trees['params']).items():
        np.testing.assert_array_equal(named_leaves(state.params)[name], value)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    with pytest.raises(UserError, match='is there already; name a new folder'):
        derived.new_folder(tmp_path / 'link')


@pytest.mark.parametrize('failing', ['written', 'read back', 'committed'])
def test_a_save_that_fails_leaves_nothing_and_can_be_tried_again(parts, tmp_path, monkeypatch, failing):
    config, trees, meta = parts

    def fail(*given, **options):
        if failing == 'read back':
            raise Damaged('a byte is another')
        if failing == 'committed':
            raise UserError('cannot write config.json: No space left on device')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'here')

    owner, name = {
        'written': (ocp.CheckpointManager, 'save'), 'read back': (readback, 'verify'), 'committed': (Workdir, 'commit'),
    }[failing]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(UserError, match=r'No space left|cannot be read back'):
            derived.write(tmp_path / 'run', config, trees, meta, 'runs/a')
    assert os.listdir(tmp_path) == []
    derived.write(tmp_path / 'run', config, trees, meta, 'runs/a')
    assert os.listdir(tmp_path) == ['run'] and Workdir(tmp_path / 'run').saved_steps() == [7]


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(parts, tmp_path):
    config, trees, meta = parts
    left, written, other = (tmp_path / f'.run.{name}' for name in ('left', 'written', 'other'))
    for folder in (left, written, other):
        (folder / 'run').mkdir(parents=True)
    (left / derived.LOCK).touch()  # whose process is gone
    with open(written / derived.LOCK, 'wb') as lock:
        assert locks.take(lock)
        derived.write(tmp_path / 'run', config, trees, meta, 'runs/a')
    assert sorted(os.listdir(tmp_path)) == ['.run.other', '.run.written', 'run']
