"""``mixcon merge``: the folder that it writes holds the same model with fewer parameters, and trains on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax import cli
from mixcon_jax import config as configs
from mixcon_jax.data import tokenizer as tokenizers
from mixcon_jax.distillation.merge import merge
from mixcon_jax.errors import UserError
from mixcon_jax.evaluate import evaluate
from mixcon_jax.inference.load import load_model
from mixcon_jax.models import decoder
from mixcon_jax.models.accounting import parameter_count
from mixcon_jax.models.context import Context
from mixcon_jax.reports.runs import find
from mixcon_jax.runs.checkpoints import Checkpoints, Meta
from mixcon_jax.runs.workdir import Workdir
from mixcon_jax.train import train
from mixcon_jax.trees import from_state
from mixcon_jax.watching.follow import WatchedRun
from tests.models.cases import perturbed
from tests.tiny import WORDS, tiny_config

OPTIONS = {
    'model__pattern': ('large_kernel', 'wide+mlp'),
    'model__layers': {'wide': {'kind': 'large_kernel', 'kernel': 31, 'expand': 1}},
    'model__num_blocks': 2,
    'train__steps': 4,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where `trained` holds a checkpoint of a model away from its initial values, and `merged` what becomes of it."""
    folder = tmp_path_factory.mktemp('merge')
    config, run = configs.resolve(configs.validate(tiny_config(folder, **OPTIONS))), Workdir(folder / 'trained')
    params = from_state(nnx.state(perturbed(decoder.create(config.model), 1, 0.1), nnx.Param))
    text = tokenizers.train(WORDS, 300).to_json()
    run.path.mkdir()
    run.commit(config, text)
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.save({'params': params, 'step': jnp.int32(3)}, Meta(3, config.to_dict(), text, heldout_loss=2.5))
    checkpoints.wait()
    checkpoints.close()
    with pytest.raises(SystemExit) as end:
        cli.main(['merge', '--workdir', str(run.path), '--out', str(folder / 'merged'), '--step', 'best'])
    assert end.value.code == 0
    return folder


def test_the_merged_model_is_the_same_function_with_fewer_parameters(folder):
    before, after = (load_model(folder / name) for name in ('trained', 'merged'))
    assert after.config.model.large_kernel.merged and after.config.model.layers.wide.merged
    assert (after.step, after.tokenizer.fingerprint) == (3, before.tokenizer.fingerprint)
    fewer = parameter_count(before.config.model).total - parameter_count(after.config.model).total
    # Of both blocks: the taps and scales of five branches, and the kernel's own scale, of 32 channels.
    assert fewer == 2 * 32 * ((5 + 7 + 3 + 3 + 3 + 6) + (5 + 9 + 3 + 3 + 3 + 6))
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, 300)
    run = lambda model: model.logits(model(tokens, Context.whole(2, 40))[0])
    logits = [run(each.model) for each in (before, after)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()


def test_what_cannot_be_merged_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r'no layer of .*merged has anything to merge'):
        merge(folder / 'merged', tmp_path / 'again')
    assert not (tmp_path / 'again').exists()
    with pytest.raises(UserError, match='is there already; name a new folder'):
        merge(folder / 'trained', folder / 'merged')


def test_a_run_that_was_made_and_not_trained_is_no_damaged_one(folder):
    run = WatchedRun(folder / 'merged')
    assert run.update() and run.status(0.0) == 'made' and run.made_of == str(folder / 'trained')
    with pytest.raises(UserError, match=r'1 left out, .*merged was made of .*trained and not trained since'):
        find([folder / 'merged'])


@pytest.mark.slow
def test_a_trained_model_is_scored_alike_and_goes_on_from_where_it_was_merged(tmp_path):
    train(tiny_config(tmp_path, **OPTIONS), tmp_path / 'first')
    merge(tmp_path / 'first', tmp_path / 'merged')
    scores = [evaluate(tmp_path / name).loss for name in ('first', 'merged')]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    source = str(tmp_path / 'merged')
    config = tiny_config(tmp_path, **OPTIONS, model__large_kernel__merged=True, train__init_from=source)
    assert train(config, tmp_path / 'on').exit_code == 0
    assert evaluate(tmp_path / 'on').loss < scores[1]
