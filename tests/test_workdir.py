"""Run directories: whose they are, what they are made of, and what goes on in them."""

import contextlib
import dataclasses
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
from mixcon_jax import optim, startup, step
from mixcon_jax import train as train_module
from mixcon_jax.cli import _step
from mixcon_jax.errors import UserError
from mixcon_jax.inference.load import load_model
from mixcon_jax.reports import runs
from mixcon_jax.runs import mark, saved
from mixcon_jax.runs.checkpoints import load_params
from mixcon_jax.runs.fingerprint import fingerprint
from mixcon_jax.runs.metrics import Metrics
from mixcon_jax.runs.records import last, read
from mixcon_jax.runs.workdir import Workdir, same_schedule
from mixcon_jax.train import ABORTED, DONE, train
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
    assert train(small(folder), folder / 'whole').exit_code == DONE
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
    assert train(small(folder, train__steps=2, log__tensorboard=True), workdir).exit_code == DONE
    assert load_params(workdir)[1].step == 2 and load_model(workdir, 'best').step == 2
    assert len(list((workdir / 'tensorboard').iterdir())) == 1
    assert train(small(folder, train__steps=4), workdir).exit_code == DONE
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
    assert train(small(folder, train__steps=2, **options), workdir).exit_code == DONE
    assert train(small(folder, **options), workdir).exit_code == DONE
    assert measured(workdir) == measured(folder / 'whole')
    assert all((workdir / name).is_symlink() for name in ('checkpoints', 'tensorboard', 'profile'))
    assert saved.steps(tmp_path / 'elsewhere-checkpoints') == [2, 4]
    assert list((tmp_path / 'elsewhere-tensorboard').iterdir())
    # A disk that is not mounted is no empty folder.
    os.rename(tmp_path / 'elsewhere-checkpoints', tmp_path / 'unmounted')
    with pytest.raises(UserError, match=r'link to .*elsewhere-checkpoints.*mount'):
        train(small(folder, train__steps=6), workdir)


# ----- whose folder it is -----

FOREIGN = {
    'config.json': '{"n_layer": 12}', 'tokenizer.json': '{"mine": 1}', 'metrics.jsonl': '{"epoch": 1, "step": 3}\n',
    'checkpoints/9/mine': 'x', 'tensorboard/events.out.tfevents.1.mine': 'x', 'profile/mine': 'x',
    'mixcon.json': '[]', 'wandb_id.txt': 'x', 'checkpoints/4.orbax-checkpoint-tmp/mine': 'x',
}  # fmt: skip


@pytest.mark.parametrize('name', FOREIGN)
def test_files_of_others_are_neither_replaced_nor_deleted(folder, tmp_path, name):
    (tmp_path / 'run' / name).parent.mkdir(parents=True)
    (tmp_path / 'run' / name).write_text(FOREIGN[name])
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
    assert train(small(folder, log__tensorboard=True), workdir).exit_code == DONE
    assert theirs.read_text() == 'mine' and len(list(theirs.parent.iterdir())) == 2
    assert measured(workdir) == measured(folder / 'whole')


@pytest.mark.parametrize('lost', [(), ('config.json',), ('tokenizer.json', 'metrics.jsonl')])
def test_a_run_from_before_there_were_marks_is_known_by_what_only_runs_hold(folder, tmp_path, lost):
    workdir = copy_of(folder, tmp_path, 2)
    for name in ('mixcon.json', *lost):
        (workdir / name).unlink()
    events = workdir / 'tensorboard' / 'events.out.tfevents.1.host'  # as such runs called theirs
    events.parent.mkdir()
    events.write_text('x')
    with Workdir(workdir).locked():
        Workdir(workdir).require_same(configs.validate(small(folder)))
        Workdir(workdir).commit(configs.validate(small(folder)), '{}')
    assert mark.read(workdir) == {'program': 'mixcon_jax', 'format': 1} and not events.exists()


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


def test_scores_that_are_no_numbers_end_no_run_as_done(folder, tmp_path, monkeypatch, capsys):
    workdir, original = copy_of(folder, tmp_path, 2), train_module.score
    broken = lambda *args: dataclasses.replace(original(*args), loss=math.nan)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, 'score', broken)
        assert train(small(folder), workdir).exit_code == ABORTED
    assert 'not finite' in capsys.readouterr().out and last(read(workdir / 'metrics.jsonl'), kind='run')['step'] == 4
    assert train(small(folder), workdir).exit_code == ABORTED  # nor does the next start find that it is


def test_an_update_that_leaves_no_numbers_ends_the_run_and_is_not_saved(folder, tmp_path, monkeypatch, capsys):
    workdir = copy_of(folder, tmp_path, 2)
    monkeypatch.setattr(step, 'all_finite', lambda tree: jnp.bool_(False))
    assert train(small(folder, checkpoint__every=1), workdir).exit_code == ABORTED
    assert 'the update of step 3' in capsys.readouterr().out and saved.steps(workdir / 'checkpoints') == [2]
    aborted = last(read(workdir / 'metrics.jsonl'), kind='run')
    assert (aborted['event'], aborted['first_bad_step'], aborted['last_bad_step']) == ('aborted', 3, 3)


def test_a_report_reads_the_configuration_in_the_checkpoint_where_the_file_is_lost(folder, tmp_path):
    workdir = copy_of(folder, tmp_path)
    whole = runs.read(workdir)[0]
    (workdir / 'config.json').unlink()
    lost = runs.read(workdir)[0]
    assert lost.config.to_dict() == whole.config.to_dict() and lost.final == whole.final is not None


# ----- more steps -----


@pytest.mark.parametrize('schedule', ['constant', 'wsd', 'cosine', 'linear'])
@pytest.mark.parametrize('lengths', [(20, 50), (33, 34), (50, 20), (10, 1000)])
def test_steps_are_those_of_another_length_while_every_learning_rate_is(schedule, lengths):
    """The oracle is the schedule itself, step by step in float32."""
    was, now = configs.default(), configs.default()
    for each, steps in zip((was, now), lengths, strict=True):
        each.optim.update(schedule=schedule, warmup_steps=3, decay_fraction=0.3)
        each.train.steps = steps
    every = jnp.arange(max(lengths))
    rates = [np.asarray(jax.vmap(optim.schedule(each.optim, each.train.steps))(every)) for each in (was, now)]
    for made in range(4, min(lengths) + 1):
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
    shorter = small(folder, optim__schedule='cosine', train__steps=2)
    train(shorter, tmp_path / 'run')
    with pytest.raises(UserError, match=r'train\.steps 2 -> 4; .*cosine.*train\.extend=true'):
        train(small(folder, optim__schedule='cosine'), tmp_path / 'run')
    before = read(tmp_path / 'run' / 'metrics.jsonl')
    longer = small(folder, optim__schedule='cosine', train__extend=True)
    assert train(longer, tmp_path / 'run').exit_code == DONE
    after = [record for record in read(tmp_path / 'run' / 'metrics.jsonl') if record['kind'] == 'train']
    assert after[:2] == [record for record in before if record['kind'] == 'train'] and after[-1]['step'] == 4
    said = capsys.readouterr().out
    for record in after[1:3]:
        assert f'{record["learning_rate"]:.3g}' in said
    # From then on the extension is the run's own length.
    assert Workdir(tmp_path / 'run').finished(small(folder, optim__schedule='cosine')) is not None


# ----- weights of another run -----


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


def test_processes_that_found_different_weights_do_not_begin(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    for found in ([4, 4], [6, 4]):
        monkeypatch.setattr(startup.multihost_utils, 'process_allgather', lambda _, found=found: np.array(found))
        with pytest.raises(UserError, match=r'\[4, 6\].*runs/a:4') if found[0] == 6 else contextlib.nullcontext():
            startup.require_same_everywhere('runs/a', found[0])
