"""Effective dimension: what the command prints is what NumPy finds in features that were collected by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcon_jax import cli
from mixcon_jax.analyses import effective_dimension as analysis
from mixcon_jax.analyses import features
from mixcon_jax.analyses.effective_dimension import Moments, analyze, effective_dimension
from mixcon_jax.data import open_dataset
from mixcon_jax.errors import UserError
from mixcon_jax.inference.load import load_model
from mixcon_jax.models.block import Residual
from mixcon_jax.models.context import Context
from mixcon_jax.train import train
from tests.tiny import tiny_config

SMALL = {'train__steps': 3, 'eval__every': 0, 'model__num_blocks': 2, 'model__init_std': 0.3}
PATTERN = ('mamba|series_mlp', 'attention')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('analyses')
    train(tiny_config(folder, model__pattern=PATTERN, **SMALL), folder / 'run')
    return folder / 'run'


@pytest.fixture(scope='module')
def by_hand(run):
    """The features of every held-out token, `[names, N, D]`, and the tokens' positions; not through the reader.

    The prefill of a decoding model, which runs layer after layer, is listened to.
    """
    trained = load_model(run)
    model, heard, kept, positions = trained.model, [], [], []
    call = Residual.__call__

    def listened(self, x, *rest):
        heard.append(x)
        return call(self, x, *rest)

    @jax.jit
    def prefilled(tokens, context):
        heard.clear()
        hidden, _, _ = model(tokens, context, model.init_state(*tokens.shape))
        return jnp.stack(heard), hidden

    read = features.reader(model)
    for batch in open_dataset(trained.config, trained.data).heldout_batches(8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Residual, '__call__', listened)
            context = Context(jnp.asarray(batch['segment_ids']), jnp.asarray(batch['positions']))
            inputs, hidden = prefilled(jnp.asarray(batch['tokens']), context)
        *_, last = read(batch)
        real = batch['segment_ids'] > 0
        np.testing.assert_allclose(model.final_norm(last)[real], hidden[real], rtol=1e-4, atol=1e-4)
        kept.append(np.concatenate([inputs, last[None]])[:, real])
        positions.append(batch['positions'][real])
    return np.concatenate(kept, axis=1, dtype=np.float64), np.concatenate(positions)


def expected(rows, share):
    """By the singular values of all rows at once."""
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    held = 0.0
    for count, value in enumerate(values, 1):
        held += value
        if held >= share * values.sum():
            return count
    raise AssertionError(held)


def printed(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        cli.main(['analyze', 'effective-dimension', *map(str, argv)])
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.mark.parametrize('share, skip', [(0.8, 1), (0.5, 0), (0.95, 3)])
def test_the_dimensions_are_those_of_features_collected_by_hand(run, by_hand, share, skip):
    rows, positions = by_hand
    counted = rows[:, positions >= skip]
    found = analyze(run, share=share, skip=skip)
    assert found.names == ('embedding', *PATTERN, *PATTERN)
    assert found.dimensions == tuple(expected(each, share) for each in counted)
    assert found.tokens == counted.shape[1] > 200 and found.width == 32 and found.step == 3
    assert all(1 < dimension < 32 for dimension in found.dimensions)


def test_they_do_not_depend_on_how_the_rows_are_batched(run):
    assert analyze(run, batch_size=3) == analyze(run, batch_size=8) == analyze(run)


def test_the_command_prints_a_line_for_each_layer_or_json(run, capsys, tmp_path):
    found = analyze(run)
    code, out, _ = printed(capsys, '--workdir', run)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2 + len(found.names)
    assert lines[0] == f'step 3: axes that hold 0.8 of the variance of {found.tokens:,} tokens'
    assert lines[1].split() == ['layer', 'kind', 'effective', 'dimension']
    bars = []
    for i, (line, name, dimension) in enumerate(zip(lines[2:], found.names, found.dimensions, strict=True)):
        words = line.split()
        assert words[: i > 0] == [str(i - 1)] * (i > 0)
        assert words[i > 0 :][:4] == [name, str(dimension), 'of', '32'], line
        bars.append(len(words[-1]))
    assert bars == [round(40 * dimension / 32) for dimension in found.dimensions]
    (tmp_path / 'a.txt').write_text('the state of a loop gains delay and noise')
    code, out, _ = printed(capsys, '--workdir', run, '--json', '--share', '0.9', tmp_path / 'a.txt')
    read, ours = json.loads(out), analyze(run, [str(tmp_path / 'a.txt')], share=0.9)
    assert code == 0 and read['tokens'] == ours.tokens < found.tokens and read['share'] == 0.9
    assert [layer['effective_dimension'] for layer in read['layers']] == list(ours.dimensions[1:])
    assert [(layer['layer'], layer['kind']) for layer in read['layers']] == list(enumerate(PATTERN * 2))
    assert read['embedding'] == ours.dimensions[0] and read['step'] == 3 and read['width'] == 32


@pytest.mark.parametrize(
    'given, message',
    [
        (['--share=0'], '--share 0 must be above 0 and at most 1'),
        (['--share=nan'], '--share'),
        (['--share=1.5'], '--share 1.5 must be above 0 and at most 1'),
        (['--skip=-1'], '--skip -1 must be at least 0'),
        (['--skip=32'], '0 tokens are too few'),
        (['--batch-size=-2'], '--batch-size -2 must be at least 1'),
        (['--step=7'], 'checkpoint 7'),
        (['/nowhere/*.txt'], '/nowhere/*.txt'),
        (['--config.model.dim=8'], 'override model.dim'),
        (['--shares=0.5'], 'unknown argument --shares=0.5'),
    ],
    ids=lambda case: case if isinstance(case, str) else ' '.join(case),
)
def test_bad_input_is_refused_in_one_line(run, capsys, given, message):
    code, out, err = printed(capsys, '--workdir', run, *given)
    assert code == 2 and not out and message in err and err.count('\n') == 1, err


def test_features_that_are_not_finite_are_named(run, monkeypatch):
    trained = load_model(run)
    trained.model.embedding[...] = trained.model.embedding[...].at[:, 3].set(jnp.inf)
    monkeypatch.setattr(analysis, 'load_model', lambda *given: dataclasses.replace(trained))
    with pytest.raises(UserError, match=r'the features of embedding in checkpoint 3 of .* are not all finite'):
        analyze(run)


@pytest.mark.slow
def test_on_a_mesh_they_are_those_of_one_device(run):
    assert analyze(run, mesh=('mesh.fsdp=2', 'mesh.data=4'), batch_size=8) == analyze(run)


# ----- the arithmetic -----
@pytest.mark.parametrize('sizes', [(97,), (1, 96), (0, 40, 0, 57), (1,) * 97], ids=str)
def test_moments_of_parts_are_those_of_the_whole(sizes):
    """Also of features whose mean is a million times what tells them apart."""
    rng = np.random.default_rng(len(sizes))
    rows = rng.normal(size=(97, 5)) @ rng.normal(size=(5, 5)) + 1e6
    moments = Moments(5)
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
        moments.add(part)
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    np.testing.assert_allclose(moments.variances(), values**2 / 97, rtol=1e-6)
    assert moments.count == 97


@pytest.mark.parametrize('share, least', [(0.05, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.8, 3), (0.9, 3), (1.0, 4)])
def test_the_least_number_of_axes(share, least):
    assert effective_dimension(np.array([4.0, 3.0, 2.0, 1.0, 0.0]), share) == least


def test_features_that_are_all_one_have_no_dimension():
    moments = Moments(3)
    moments.add(np.full((7, 3), 0.1, np.float32))
    assert effective_dimension(moments.variances()) == 0
