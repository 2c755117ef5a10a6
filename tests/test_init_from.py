"""`train.init_from`: a run that begins with the weights of another, which must be a model's own."""

import pytest

from mixcon_jax.errors import UserError
from mixcon_jax.runs.fingerprint import fingerprint
from mixcon_jax.runs.records import last, read
from mixcon_jax.runs.weights import load_params
from mixcon_jax.train import train
from tests.tiny import tiny_config


def small_config(folder, **overrides):
    return tiny_config(folder, **({'model__pattern': ('attention+mlp',), 'train__steps': 8} | overrides))


def one_step(folder, source, **overrides):
    """A run of a step that, by a learning rate that rounds to nothing, leaves parameters as they are."""
    options = {'train__steps': 1, 'optim__warmup_steps': 0, 'optim__learning_rate': 1e-30, 'seed': 3}
    return small_config(folder, **(options | {'train__init_from': str(source)} | overrides))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Corpus, caches, and ``whole``: a run of 8 steps, evaluated and saved every 4."""
    folder = tmp_path_factory.mktemp('train')
    train(small_config(folder), folder / 'whole')
    return folder


@pytest.mark.parametrize('which, step', [pytest.param('', 8, marks=pytest.mark.slow), (':4', 4), (':best', 8)])
def test_it_takes_weights_alone(folder, tmp_path, which, step):
    result = train(one_step(folder, f'{folder / "whole"}{which}'), tmp_path / 'run')
    assert result.fingerprint == fingerprint(load_params(folder / 'whole', step)[0]['params'])
    assert last(read(tmp_path / 'run' / 'metrics.jsonl'), kind='run')['step'] == 1


def test_another_shape_names_the_parameter(folder, tmp_path):
    with pytest.raises(UserError, match='embedding'):
        train(one_step(folder, folder / 'whole', model__vocab_size=328), tmp_path / 'run')


@pytest.mark.parametrize(
    'options, message',
    [
        (
            {'model__vocab_size': 324, 'mesh__tensor': 4, 'model__pattern': ('mamba2',)},
            r'^parameter embedding has shape \(321, 32\) in the loaded weights but \(324, 32\) in the model; use their',
        ),
        ({'model__vocab_size': 321, 'model__pattern': ('mamba',)}, r'^parameter blocks/layers/0/mixer/A_log has shape'),
    ],
    ids=['which the mesh does not divide', 'of another rank'],
)
def test_weights_of_shapes_that_do_not_fit_are_not_taken_for_damaged(folder, tmp_path, options, message, capsys):
    source, sizes = tmp_path / 'source', {'model__mamba2__head_dim': 16, 'model__mamba2__d_state': 4}
    train(small_config(folder, model__pattern=('mamba2',), model__vocab_size=321, train__steps=2, **sizes), source)
    capsys.readouterr()
    with pytest.raises(UserError, match=message):
        train(one_step(folder, source, **options, **sizes), tmp_path / 'run')
    assert 'damaged' not in capsys.readouterr().out


def test_another_tokenizer_says_which_to_use(folder, tmp_path):
    config = one_step(folder, folder / 'whole', data__tokenizer_vocab_size=280)
    with pytest.raises(UserError, match=r'data\.tokenizer.*tokenizer\.json'):
        train(config, tmp_path / 'run')


def test_options_by_which_the_weights_compute_something_else_are_said(folder, tmp_path, capsys):
    train(one_step(folder, folder / 'whole', model__init_std=0.1, model__dtype='bfloat16'), tmp_path / 'same')
    assert 'something else' not in capsys.readouterr().out
    others = {'model__attention__rope': True, 'model__norm_eps': 1e-5, 'model__moe__top_k': 2}
    train(one_step(folder, folder / 'whole', **others), tmp_path / 'other')
    told = 'model.norm_eps=1e-06 is 1e-05 here, model.attention.rope=False is True here\n'
    assert f'these weights are of a model that computes something else: {told}' in capsys.readouterr().out


def test_a_layer_with_a_name_of_its_own_and_biases_that_are_left_out(folder, tmp_path, capsys):
    options = {
        'model__pattern': ('attention+moe',),
        'model__moe__balance': 'bias',
        'model__moe__bias_rate': 0.1,
        'model__moe__hidden_dim': 32,
    }
    train(
        small_config(folder, **options, train__steps=3), tmp_path / 'source'
    )  # an odd number: ups and downs do not cancel
    config = one_step(folder, tmp_path / 'source', **options, model__moe__top_k=2)
    config.model.moe.balance = 'loss'
    config.model.layers.local = {'kind': 'attention', 'window': 8}
    config.model.pattern = ('local+moe',)
    train(config, tmp_path / 'run')
    said = capsys.readouterr().out
    assert "model.pattern=('attention+moe',) is ('local+moe',) here, model.moe.top_k=1 is 2 here\n" in said
    assert 'left out, as this model has no such buffers: ' in said
