"""``mixcon merge``: the folder that it writes holds the same model with fewer parameters, and trains on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcon_jax import cli
from mixcon_jax.errors import UserError
from mixcon_jax.evaluate import evaluate
from mixcon_jax.inference.load import load_model
from mixcon_jax.inference.merge import merge
from mixcon_jax.models.accounting import parameter_count
from mixcon_jax.models.context import Context
from mixcon_jax.train import train
from tests.tiny import tiny_config

OPTIONS = {
    'model__pattern': ('large_kernel', 'wide+mlp', 'attention|mlp'),
    'model__layers': {'wide': {'kind': 'large_kernel', 'kernel': 31, 'expand': 1}},
    'model__num_blocks': 2,
    'train__steps': 4,
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The folder of a trained model with branches, `trained`, and of what became of it, `merged`."""
    folder = tmp_path_factory.mktemp('merge')
    train(tiny_config(folder, **OPTIONS), folder / 'trained')
    with pytest.raises(SystemExit) as end:
        cli.main(['merge', '--workdir', str(folder / 'trained'), '--out', str(folder / 'merged')])
    assert end.value.code == 0
    return folder


def test_the_merged_model_is_the_same_function_with_fewer_parameters(runs):
    before, after = (load_model(runs / name) for name in ('trained', 'merged'))
    assert after.config.model.large_kernel.merged and after.config.model.layers.wide.merged
    assert (after.step, after.tokenizer.fingerprint) == (4, before.tokenizer.fingerprint)
    fewer = parameter_count(before.config.model).total - parameter_count(after.config.model).total
    # Of both blocks: the taps and scales of five branches, and the kernel's own scale, of 32 channels.
    assert fewer == 2 * 32 * ((5 + 7 + 3 + 3 + 3 + 6) + (5 + 9 + 3 + 3 + 3 + 6))
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, 300)
    logits = [each.model.logits(each.model(tokens, Context.whole(2, 40))[0]) for each in (before, after)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()
    assert jnp.abs(logits[0]).max() > 1e-3


def test_it_is_scored_alike_and_training_goes_on_from_it(runs):
    scores = [evaluate(runs / name).loss for name in ('trained', 'merged')]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    source = str(runs / 'merged')
    config = tiny_config(runs, **OPTIONS, model__large_kernel__merged=True, train__init_from=source)
    assert train(config, runs / 'on').exit_code == 0
    assert evaluate(runs / 'on').loss < scores[1]


def test_what_cannot_be_merged_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match='no layer of .*merged has anything to merge'):
        merge(runs / 'merged', tmp_path / 'again')
    assert not (tmp_path / 'again').exists()
    with pytest.raises(UserError, match='holds a run; name another folder'):
        merge(runs / 'trained', runs / 'merged')
