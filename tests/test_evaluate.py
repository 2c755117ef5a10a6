"""Scores that mean what they say: bits per byte only of text that comes back, and of the data of the run."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import tokenizers

from mixcon_jax import cli
from mixcon_jax import evaluate as evaluate_lib
from mixcon_jax.data import open_dataset
from mixcon_jax.data.tokenizer import load as load_tokenizer
from mixcon_jax.errors import UserError
from mixcon_jax.evaluate import evaluate, score
from mixcon_jax.train import train
from tests.tiny import WORDS, tiny_config, write_experiment

SMALL = {'train__steps': 2, 'eval__every': 0, 'model__pattern': ('mamba',)}


def lossy_tokenizer(path: Path) -> str:
    vocab = {word: i for i, word in enumerate(['</s>', '[UNK]', *WORDS[:5]])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '[UNK]'))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(path))
    return str(path)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of a run, in run/, with its text, in corpus/, and its cache."""
    folder = tmp_path_factory.mktemp('whole')
    return folder, train(tiny_config(folder, **SMALL), folder / 'run')


def described(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(['eval', '--workdir', *map(str, argv)])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return out


def test_no_bits_per_byte_of_text_that_does_not_come_back(whole, tmp_path, capsys, monkeypatch):
    folder, result = whole
    assert result.metrics['bits_per_byte'] > 0
    config = tiny_config(tmp_path, data__tokenizer=lossy_tokenizer(tmp_path / 'lossy.json'))
    heldout = open_dataset(config).heldout_batches(2)
    scores = score(lambda batch: {'nll': 6.0, 'correct': 1, 'tokens': int(batch['loss_mask'].sum())}, heldout, 1)
    assert scores.bits_per_byte is None and 0 < scores.round_trip < 1 and scores.bytes > 0 and scores.loss > 0
    # Files are measured themselves.
    lossy, load = load_tokenizer(tmp_path / 'lossy.json'), evaluate_lib.load_model
    monkeypatch.setattr(evaluate_lib, 'load_model', lambda *given: dataclasses.replace(load(*given), tokenizer=lossy))
    (tmp_path / 'lost.txt').write_text('the state unknown words')
    (tmp_path / 'kept.txt').write_text('the')
    lost, kept = (evaluate(folder / 'run', [str(tmp_path / name)]) for name in ('lost.txt', 'kept.txt'))
    assert lost.bits_per_byte is None and 0 < lost.round_trip < 1
    assert kept.round_trip == 1 and kept.bits_per_byte > 0
    out = described(capsys, folder / 'run', tmp_path / 'lost.txt')
    assert 'no bits per byte, for the tokenizer gives back' in out and '% of 23 bytes' in out


def test_files_are_scored_once_each(whole, tmp_path):
    folder, _ = whole
    (tmp_path / 'a[1].txt').write_text('the state of a loop')
    (tmp_path / 'link.txt').symlink_to('a[1].txt')
    once = evaluate(folder / 'run', [str(tmp_path / 'a[1].txt')])
    twice = evaluate(folder / 'run', [str(tmp_path / 'a[1].txt'), f'{tmp_path}/*.txt', f'{tmp_path}/link.txt'])
    assert once.bytes == twice.bytes == 19 and once.loss == twice.loss and once.round_trip == 1


def test_the_heldout_text_of_a_run_is_found_by_its_hash(whole, tmp_path, capsys):
    folder, result = whole
    before = evaluate(folder / 'run')
    assert before.loss == pytest.approx(result.metrics['loss'], rel=1e-5) and before.bits_per_byte > 0
    for name in ('000.txt', '001.txt'):  # changed, and gone
        shutil.copy(folder / 'corpus' / name, tmp_path / name)
    (folder / 'corpus' / '000.txt').write_text('other text')
    (folder / 'corpus' / '001.txt').unlink()
    assert evaluate(folder / 'run') == before
    # Without the tokens either there is nothing to score, and nothing else is scored instead.
    stores = [path for path in (folder / 'cache').iterdir() if (path / 'metadata.json').exists()]
    for path in stores:
        shutil.move(path, tmp_path / path.name)
    with pytest.raises(UserError, match=r'not what .* was trained on|another tokenizer'):
        evaluate(folder / 'run')
    for path in stores:
        shutil.move(tmp_path / path.name, path)
    assert evaluate(folder / 'run') == before


@pytest.mark.parametrize('name', ['a,b', 'a, b', 'x,y,z'])
def test_commas_in_paths_of_sources(tmp_path, capsys, name):
    folder = tmp_path / name
    config = tiny_config(tmp_path)
    shutil.copytree(tmp_path / 'corpus', folder)
    experiment = write_experiment(tmp_path / 'experiment.py', config)
    for value, count in ((f'files:{folder}/*.txt', 1), (f'files:{folder}/*.txt,files:{folder}/00*.txt', 2)):
        with pytest.raises(SystemExit) as end:
            cli.main(['data', 'prepare', '--config', str(experiment), f"--config.data.sources='{value}'"])
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        assert sum('documents' in line for line in out.splitlines()) == 2 * count
