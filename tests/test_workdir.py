"""Run directories: whose they are, what they are made of, and what goes on in them."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax import optim, startup
from mixcon_jax import train as train_module
from mixcon_jax.commands import _step
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.inference.load import load_model
from mixcon_jax.reports import runs
from mixcon_jax.runs import mark, saved
from mixcon_jax.runs.fingerprint import fingerprint
from mixcon_jax.runs.metrics import Metrics
from mixcon_jax.runs.records import last, read
from mixcon_jax.runs.weights import load_params
from mixcon_jax.runs.workdir import Workdir, report_if_finished, same_schedule
from mixcon_jax.train import train
from tests.test_train import contents
from tests.tiny import TIMELESS, tiny_config


def small(folder: Path, **overrides):
    """A run of 4 steps that a longer one can go on from, evaluated and saved every 2."""
    options = {
        'model__pattern': ('attention+mlp',), 'train__steps': 4, 'eval__every': 2, 'checkpoint__every': 2,
        'optim__schedule': 'constant', 'eval__max_rows': 4,
    }  # fmt: skip
    return tiny_config(folder, **(options | overrides))


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Corpus, caches, and ``whole``: a finished run."""
    folder = tmp_path_factory.mktemp('workdir')
    assert train(small(folder), folder / 'whole').exit_code == Exit.DONE
    return folder


def copy_of(folder: Path, tmp_path: Path, step: int = 4) -> Path:
    """The whole run as it was right after its checkpoint of ``step``."""
    shutil.copytree(folder / 'whole', tmp_path / 'run')
    path = tmp_path / 'run' / 'metrics.jsonl'
    if step < 4:
        shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
        lines = path.read_text().splitlines(keepends=True)
        path.write_text(''.join(line for line in lines if json.loads(line)['step'] <= step))
    return tmp_path / 'run'


def measured(workdir: Path) -> list[dict]:
    """What the records say that is no time, but for where starts and ends were."""
    kept = [record for record in read(workdir / 'metrics.jsonl') if record['kind'] in ('train', 'eval')]
    return [{key: value for key, value in record.items() if key not in TIMELESS} for record in kept]


# ----- paths -----


def test_a_path_with_letters_of_patterns_is_a_path_like_any_other(folder, tmp_path):
    """Orbax looks for what it wrote by a glob, so that nothing it saved could be loaded."""
    workdir = tmp_path / 'exp [v2] {a}*?\\ %41 é'
    assert train(small(folder, train__steps=2, log__tensorboard=True), workdir).exit_code == Exit.DONE
    assert load_params(workdir)[1].step == 2 and load_model(workdir, 'best').step == 2
    assert len(list((workdir / 'tensorboard').iterdir())) == 1
    assert train(small(folder, train__steps=4), workdir).exit_code == Exit.DONE
    assert measured(workdir) == measured(folder / 'whole')


@pytest.mark.parametrize('take', [Workdir, load_params, load_model, _step])
def test_an_empty_argument_is_refused(take):
    """That of a variable that is not set would be the current folder, or the newest checkpoint."""
    for text in ('', ' '):
        with pytest.raises(UserError, match=r'empty|must be'):
            take(text)


def test_folders_of_a_run_may_be_links(folder, tmp_path):
    workdir = tmp_path / 'run'
    workdir.mkdir()
    for name in ('checkpoints', 'tensorboard', 'profile'):
        (tmp_path / f'elsewhere-{name}').mkdir()
        (workdir / name).symlink_to(tmp_path / f'elsewhere-{name}')
    options = {'log__tensorboard': True, 'log__profile_start': 1, 'log__profile_steps': 1}
    assert train(small(folder, train__steps=2, **options), workdir).exit_code == Exit.DONE
    assert train(small(folder, **options), workdir).exit_code == Exit.DONE
    assert measured(workdir) == measured(folder / 'whole')
    assert all((workdir / name).is_symlink() for name in ('checkpoints', 'tensorboard', 'profile'))
    assert saved.steps(tmp_path / 'elsewhere-checkpoints') == [2, 4]
    assert list((tmp_path / 'elsewhere-tensorboard').iterdir())
    # A disk that is not mounted is no empty folder.
    os.rename(tmp_path / 'elsewhere-checkpoints', tmp_path / 'unmounted')
    with pytest.raises(UserError, match=r'link to .*elsewhere-checkpoints.*mount'):
        train(small(folder, train__steps=6), workdir)


# ----- whose folder it is -----

HYDRA = {'model': {'dim': 8}, 'data': {'seq_len': 8}, 'optim': {'learning_rate': 1e-3}, 'train': {'steps': 5}}
FOREIGN = [
    ('config.json', '{"n_layer": 12}'), ('config.json', json.dumps(HYDRA)), ('config.json', '[' * 100_000),
    ('config.json', json.dumps(configs.default().to_dict() | {'trainer': {'gpus': 8}})),
    ('tokenizer.json', '{"mine": 1}'), ('metrics.jsonl', '{"epoch": 1, "step": 3}\n'), ('mixcon.json', '[]'),
    ('mixcon.json', '[' * 100_000), ('checkpoints/9/mine', 'x'), ('checkpoints/4.orbax-checkpoint-tmp/mine', 'x'),
    ('tensorboard/events.out.tfevents.1.mine', 'x'), ('profile/mine', 'x'), ('wandb_id.txt', 'x'),
    ('checkpoints/9/meta/metadata', json.dumps({'contents': {'step': 9}, 'sha256': ''})),
]  # fmt: skip


def test_a_start_that_is_refused_changes_nothing(folder, tmp_path, monkeypatch):
    workdir, find = copy_of(folder, tmp_path), importlib.util.find_spec
    before = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name == 'wandb' else find(name, *rest))
    with pytest.raises(UserError, match='wandb is not installed'):
        train(small(folder, train__steps=6, checkpoint__keep_last=1, checkpoint__keep_best=0, log__wandb=True), workdir)
    assert {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()} == before


@pytest.mark.parametrize('name, text', FOREIGN)
def test_files_of_others_are_neither_replaced_nor_deleted(folder, tmp_path, name, text):
    (tmp_path / 'run' / name).parent.mkdir(parents=True)
    (tmp_path / 'run' / name).write_text(text)
    (tmp_path / 'run' / '.lock').write_text('mine')
    before = contents(tmp_path / 'run')
    with pytest.raises(UserError, match=rf'{name.split("/")[0]}.*no run.*another workdir') as error:
        train(small(folder), tmp_path / 'run')
    assert contents(tmp_path / 'run') == before and '\n' not in str(error.value)


def test_a_folder_that_only_has_other_files_may_become_a_run(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    (tmp_path / 'checkpoints').mkdir()
    with Workdir(tmp_path).locked():
        Workdir(tmp_path).commit(small(tmp_path), '{}')
    assert mark.is_run(tmp_path) and (tmp_path / 'notes.txt').read_text() == 'mine'


def test_files_that_others_put_into_a_run_stay(folder, tmp_path):
    workdir = copy_of(folder, tmp_path, 2)
    theirs = workdir / 'tensorboard' / 'events.out.tfevents.1.mine'
    theirs.parent.mkdir()
    theirs.write_text('mine')
    assert train(small(folder, log__tensorboard=True), workdir).exit_code == Exit.DONE
    assert theirs.read_text() == 'mine' and len(list(theirs.parent.iterdir())) == 2
    assert measured(workdir) == measured(folder / 'whole')


@pytest.mark.parametrize('lost', [(), ('config.json',), ('tokenizer.json', 'metrics.jsonl')])
def test_a_run_from_before_there_were_marks_is_known_by_what_only_runs_hold(folder, tmp_path, lost):
    workdir = copy_of(folder, tmp_path, 2)
    for name in ('mixcon.json', *lost):
        (workdir / name).unlink()
    events = workdir / 'tensorboard' / 'events.out.tfevents.1.host'  # such runs called theirs so, as others do
    events.parent.mkdir()
    events.write_text('x')
    with Workdir(workdir).locked():
        Workdir(workdir).require_same(configs.validate(small(folder)))
        Workdir(workdir).commit(configs.validate(small(folder)), '{}')
    assert mark.read(workdir) == {'program': 'mixcon_jax', 'format': 1} and events.exists()


# ----- what a run is -----


def test_the_configuration_in_the_checkpoint_is_the_truth(folder, tmp_path):
    """Not the file beside it, which may be lost, or another's."""
    workdir = copy_of(folder, tmp_path)
    other = small(folder, optim__learning_rate=0.1, seed=5)
    for spoil in (lambda path: path.write_text(configs.to_json(configs.validate(other))), os.remove):
        spoil(workdir / 'config.json')
        before = contents(workdir)
        with pytest.raises(UserError, match=r'optim\.learning_rate 0\.004 -> 0\.1, seed 0 -> 5'):
            train(other, workdir)
        assert contents(workdir) == before
        assert train(small(folder), workdir).metrics == train(small(folder), folder / 'whole').metrics


def test_a_run_whose_last_checkpoint_is_half_gone_is_not_done(folder, tmp_path):
    workdir = copy_of(folder, tmp_path)
    assert Workdir(workdir).finished(small(folder)) is not None
    shutil.rmtree(workdir / 'checkpoints' / '4' / 'optimizer')
    assert Workdir(workdir).finished(small(folder)) is None


@pytest.mark.parametrize('lost', ['_CHECKPOINT_METADATA', 'model/_sharding'])
def test_a_run_whose_last_checkpoint_lost_nothing_that_it_is_read_by_is_done_again(folder, tmp_path, lost):
    workdir = copy_of(folder, tmp_path)
    before = Workdir(workdir).finished(small(folder))
    (workdir / 'checkpoints' / '4' / lost).unlink()
    assert Workdir(workdir).finished(small(folder)) is None
    assert train(small(folder), workdir).fingerprint == before['fingerprint']
    assert Workdir(workdir).finished(small(folder)) is not None


@pytest.mark.parametrize('damage', [
    {'loss': None}, {'loss': '3'}, {'loss': 10**400}, {'step': '4'}, {'step': None}, {'step': True}, {'bytes': ...},
    {'fingerprint': ...}, {'fingerprint': 3}, {'kind': None}, {'baselines': None}, {'tokens': [1]}, {'perplexity': '1'},
    {'baselines': {'gzip': 'x'}}, {'bytes': 0, 'by_length': 3}, {'bytes': 0, 'by_length': {'8': {}}},
])  # fmt: skip
def test_a_damaged_record_of_the_end_makes_no_run_done(folder, tmp_path, damage):
    workdir = copy_of(folder, tmp_path)
    *lines, end = (workdir / 'metrics.jsonl').read_text().splitlines()
    record = json.loads(end) | damage
    record = {key: value for key, value in record.items() if value is not ...}
    (workdir / 'metrics.jsonl').write_text('\n'.join([*lines, json.dumps(record), '']))
    assert report_if_finished(small(folder), workdir) is None
    (workdir / 'metrics.jsonl').write_text('\n'.join([*lines, end, '']))
    assert report_if_finished(small(folder), workdir) is not None


@pytest.mark.parametrize('key, value', [
    ('model.attention.num_heads', 0), ('model.pattern', 3), ('optim', None), ('train.steps', 4.5), ('data.sources', ())
])  # fmt: skip
def test_of_a_configuration_that_cannot_be_no_run_is_done(folder, key, value):
    config = small(folder)
    configs.put(config, key, value)
    assert Workdir(folder / 'whole').finished(config) is None


def test_scores_that_are_no_numbers_end_no_run_as_done(folder, tmp_path, monkeypatch, capsys):
    workdir, original = copy_of(folder, tmp_path, 2), train_module.score
    broken = lambda *args: dataclasses.replace(original(*args), loss=math.nan)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, 'score', broken)
        assert train(small(folder), workdir).exit_code == Exit.ABORTED
    assert 'not finite' in capsys.readouterr().out and last(read(workdir / 'metrics.jsonl'), kind='run')['step'] == 4
    assert train(small(folder), workdir).exit_code == Exit.ABORTED  # nor does the next start find that it is


def test_an_update_that_leaves_no_numbers_ends_the_run_and_is_not_saved(folder, tmp_path, monkeypatch, capsys):
    workdir = copy_of(folder, tmp_path, 2)
    monkeypatch.setattr('mixcon_jax.parallel.magnitude.all_finite', lambda tree, specs: jnp.bool_(False))
    assert train(small(folder, checkpoint__every=1), workdir).exit_code == Exit.ABORTED
    assert 'the update of step 3' in capsys.readouterr().out and saved.steps(workdir / 'checkpoints') == [2]
    aborted = last(read(workdir / 'metrics.jsonl'), kind='run')
    assert (aborted['event'], aborted['first_bad_step'], aborted['last_bad_step']) == ('aborted', 3, 3)


def test_a_report_reads_the_configuration_in_the_checkpoint_where_the_file_is_lost(folder, tmp_path):
    workdir = copy_of(folder, tmp_path)
    whole = runs.ReportedRun(workdir)
    (workdir / 'config.json').unlink()
    lost = runs.ReportedRun(workdir)
    assert lost.config.to_dict() == whole.config.to_dict() and lost.final == whole.final is not None


def test_of_a_file_that_is_another_runs_a_report_takes_what_may_change_alone(folder, tmp_path):
    workdir = copy_of(folder, tmp_path)
    whole = runs.ReportedRun(workdir).config
    other = configs.validate(small(folder, optim__learning_rate=0.1, seed=5, eval__every=9, name='new', train__steps=6))
    (workdir / 'config.json').write_text(configs.to_json(other))
    changed = configs.differences(whole, runs.ReportedRun(workdir).config)
    assert changed == {'eval.every': (2, 9), 'name': ('', 'new'), 'train.steps': (4, 6)}


# ----- more steps -----


@pytest.mark.parametrize('schedule', ['constant', 'wsd', 'cosine', 'linear'])
@pytest.mark.parametrize('lengths', [(20, 50), (33, 34), (50, 20), (10, 1000), (4, 1000)])
def test_steps_are_those_of_another_length_while_every_learning_rate_is(schedule, lengths):
    """The oracle is the schedule itself, step by step in float32."""
    was, now = configs.default(), configs.default()
    for each, steps in zip((was, now), lengths, strict=True):
        each.optim.update(schedule=schedule, warmup_steps=3, decay_fraction=0.3)
        each.train.steps = steps
    every = jnp.arange(max(lengths))
    rates = [np.asarray(jax.vmap(optim.schedule(each.optim, each.train.steps))(every)) for each in (was, now)]
    for made in range(min(lengths) + 1):
        assert same_schedule(was, now, made) == np.array_equal(rates[0][:made], rates[1][:made]), made


def test_more_steps_give_the_longer_run_bit_for_bit(folder, tmp_path, capsys):
    workdir, longer = copy_of(folder, tmp_path), small(folder, train__steps=6)
    result = train(longer, workdir)
    whole = train(longer, tmp_path / 'longer')
    assert 'those of the longer schedule' in capsys.readouterr().out
    assert result == whole and measured(workdir) == measured(tmp_path / 'longer')
    # Scores belong to their step: those of the old end are not those of the new one.
    finals = {r['step']: r['loss'] for r in read(workdir / 'metrics.jsonl') if r['kind'] == 'final'}
    assert finals[6] == result.metrics['loss'] != finals[4]
    with pytest.raises(UserError, match='6 steps are made already'):
        train(small(folder), workdir)


def test_cosine_goes_on_only_when_told_to_and_says_what_that_does(folder, tmp_path, capsys):
    cosine = {'optim__schedule': 'cosine', 'optim__warmup_steps': 1}
    shorter = small(folder, **cosine, train__steps=2)
    train(shorter, tmp_path / 'run')
    with pytest.raises(UserError, match=r'train\.steps 2 -> 4; .*cosine.*train\.extend=true'):
        train(small(folder, **cosine), tmp_path / 'run')
    before = read(tmp_path / 'run' / 'metrics.jsonl')
    longer = small(folder, **cosine, train__extend=True)
    assert train(longer, tmp_path / 'run').exit_code == Exit.DONE
    after = [record for record in read(tmp_path / 'run' / 'metrics.jsonl') if record['kind'] == 'train']
    assert after[:2] == [record for record in before if record['kind'] == 'train'] and after[-1]['step'] == 4
    said = capsys.readouterr().out
    for record in after[1:3]:
        assert f'{record["learning_rate"]:.3g}' in said
    # From then on the extension is the run's own length.
    assert Workdir(tmp_path / 'run').finished(small(folder, **cosine)) is not None


def test_a_run_that_was_killed_before_its_first_checkpoint_takes_any_length(folder, tmp_path):
    """No step of it is kept."""
    workdir, cosine = copy_of(folder, tmp_path, 2), {'optim__schedule': 'cosine'}
    shutil.rmtree(workdir / 'checkpoints')
    (workdir / 'config.json').write_text(configs.to_json(configs.validate(small(folder, **cosine))))
    assert Workdir(workdir).has_progress()
    Workdir(workdir).require_same(configs.validate(small(folder, **cosine, train__steps=9)))
    with pytest.raises(UserError, match=r'seed 0 -> 3'):
        Workdir(workdir).require_same(configs.validate(small(folder, **cosine, seed=3)))


# ----- text under another name -----


def test_a_run_goes_on_with_its_text_wherever_it_is_now(folder, tmp_path, capsys):
    """Options that name the text may change, the tokens may not."""
    workdir, moved = copy_of(folder, tmp_path, 2), tmp_path / 'moved'
    shutil.copytree(folder / 'corpus', moved)
    config = small(folder, data__sources=(f'files:{moved}/*.txt',), data__bad_records='skip')
    assert train(config, workdir).metrics == train(small(folder), folder / 'whole').metrics
    assert measured(workdir) == measured(folder / 'whole')
    # Nor is a finished run that of other text: what is done is found out by the tokens.
    (moved / '000.txt').write_text('other text ' * 50)
    again = copy_of(folder, tmp_path / 'again')
    before = contents(again)
    with pytest.raises(UserError, match=r'checkpoint 4 .*other text.*data\.sources .*corpus.* -> .*moved') as error:
        train(config, again)
    assert '\n' not in str(error.value) and contents(again) == before
    with pytest.raises(UserError, match=r'data\.tokenizer_vocab_size 300 -> 301\)'):
        train(small(folder, data__tokenizer_vocab_size=301), again)
    own = small(folder, data__tokenizer=str(folder / 'whole' / 'tokenizer.json'))
    capsys.readouterr()
    assert train(own, again).exit_code == Exit.DONE
    assert 'done after 4 steps' in capsys.readouterr().out


# ----- weights of another run -----


@pytest.mark.parametrize('which, meant', [
    ('', None), (':best', 'best'), (':last', None), (':0', 0), (':12', 12), (':007', 7),
    (':٢', ...), (':²', ...), (':-1', ...), (':1.0', ...), (f':{"1" * 5000}', ...), (':', ...), (':x', ...),
])  # fmt: skip
def test_one_reader_of_steps_for_init_from_and_step(which, meant):
    """What is no step is part of a folder's name, or refused."""
    named = startup.weights_named(f'runs/a{which}')
    assert named == ((f'runs/a{which}', None) if meant is ... else ('runs/a', meant))
    if which:
        with pytest.raises(UserError, match='--step') if meant is ... else contextlib.nullcontext():
            assert _step(which[1:]) == meant


@pytest.mark.parametrize('known', [{}, {'source': 'a'}, {'source': 3, 'step': 1}, {'source': 'a', 'step': '1'}, 3])
def test_a_mark_that_does_not_say_which_weights_were_meant_says_nothing(tmp_path, known):
    (tmp_path / 'mixcon.json').write_text(mark.text({'init_from': known}))
    assert Workdir(tmp_path).init_from() is None and mark.is_run(tmp_path)


def test_init_from_means_what_it_meant_when_the_run_began(folder, tmp_path, monkeypatch):
    """The other run goes on; this one is killed before its first checkpoint and started again."""
    source = copy_of(folder, tmp_path, 2)
    config = small(
        folder, train__init_from=str(source), train__steps=1, optim__learning_rate=1e-30, seed=3, optim__warmup_steps=0
    )

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, 'train', killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / 'new')
    meant = fingerprint(load_params(source)[0]['params'])
    assert Workdir(tmp_path / 'new').init_from() == {'source': str(source), 'step': 2, 'fingerprint': meant}
    assert saved.steps(tmp_path / 'new' / 'checkpoints') == []
    shutil.copytree(folder / 'whole' / 'checkpoints' / '4', source / 'checkpoints' / '4')
    shutil.copytree(tmp_path / 'new', tmp_path / 'other')
    assert train(config, tmp_path / 'new').fingerprint == meant
    assert Workdir(tmp_path / 'new').init_from()['step'] == 2
    shutil.rmtree(source / 'checkpoints' / '2')
    with pytest.raises(UserError, match=r'no checkpoint 2 .*this run began with it'):
        train(config, tmp_path / 'other')
