"""The training loop from one end to the other, in this process, with a model that compiles fast."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax import train as train_module
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host.signals import STOPPING, StopRequest
from mixcon_jax.runs.checkpoints import Checkpoints
from mixcon_jax.runs.fingerprint import fingerprint
from mixcon_jax.runs.metrics import Metrics
from mixcon_jax.runs.records import last, read
from mixcon_jax.runs.trace import Trace
from mixcon_jax.runs.weights import load_params
from mixcon_jax.runs.workdir import Workdir
from mixcon_jax.train import Result, train
from tests.test_resume import outcome
from tests.tiny import ROOT, tiny_config, write_corpus, write_experiment

STEPS = 8
STOPS = [(signal.SIGTERM, 2), (signal.SIGHUP, STEPS)]  # at which step; test_stop.py asks other signals
STOPS += [pytest.param(*more, marks=pytest.mark.slow) for more in ((signal.SIGINT, 5), (signal.SIGUSR1, 3))]


def small_config(folder: Path, **overrides):
    return tiny_config(folder, **({'model__pattern': ('attention+mlp',), 'train__steps': STEPS} | overrides))


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Corpus, caches, and ``whole``: a run of 8 steps, evaluated and saved every 4."""
    folder = tmp_path_factory.mktemp('train')
    result = train(small_config(folder), folder / 'whole')
    assert result.exit_code == Exit.DONE and result.step == STEPS
    return folder


def copy_of(folder: Path, tmp_path: Path, step: int) -> Path:
    """The whole run as it was right after its checkpoint of ``step``."""
    workdir = tmp_path / 'run'
    shutil.copytree(folder / 'whole', workdir)
    for path in (workdir / 'checkpoints').iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (workdir / 'metrics.jsonl').write_text(''.join(line for line in lines if json.loads(line)['step'] <= step))
    return workdir


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def stop_at(monkeypatch, step: int, number: int) -> None:
    """Sends this process a signal when the metrics of a step are read."""
    original = Metrics.train

    def train_and_signal(self, at, metrics):
        if at == step:
            signal.raise_signal(number)
        return original(self, at, metrics)

    monkeypatch.setattr(Metrics, 'train', train_and_signal)


# ----- a whole run -----


def test_a_run_leaves_everything_in_its_workdir(folder, capsys):
    workdir = folder / 'whole'
    records = read(workdir / 'metrics.jsonl')
    assert [r['step'] for r in records if r['kind'] == 'train'] == list(range(1, STEPS + 1))
    assert [r['step'] for r in records if r['kind'] == 'eval'] == [4, 8]
    assert sorted(r['step'] for r in records if r['kind'] == 'checkpoint') == [4, 8]
    losses = [r['loss'] for r in records if r['kind'] == 'train']
    assert losses[-1] < losses[0] < np.log(320) + 0.5
    assert configs.read(workdir / 'config.json').to_dict() == configs.validate(small_config(folder)).to_dict()
    done = last(records, kind='run')
    tree, meta = load_params(workdir)
    assert done['fingerprint'] == fingerprint(tree['params'])
    assert meta.step == STEPS and meta.tokenizer == (workdir / 'tokenizer.json').read_text()
    assert meta.heldout_loss == pytest.approx(last(records, kind='final')['loss'])
    assert meta.tokens_seen == done['tokens_seen'] == sum(r['tokens'] for r in records if r['kind'] == 'train')


def test_a_finished_run_says_so_and_does_nothing(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in (folder / 'whole').rglob('*')}
    result = train(small_config(folder), folder / 'whole')
    assert 'is done after 8 steps' in capsys.readouterr().out
    assert result.exit_code == Exit.DONE and len(result.fingerprint) == 64 and result.metrics['bits_per_byte'] > 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / 'whole').rglob('*')}


def test_a_finished_run_answers_without_loading_jax(folder, tmp_path):
    experiment = write_experiment(tmp_path / 'experiment.py', small_config(folder))
    script = (
        'import sys; from mixcon_jax.cli import main\n'
        f'try: main(["train", "--config={experiment}", "--workdir={folder / "whole"}"])\n'
        'except SystemExit as end: print(end.code, "jax" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == '0 False', done.stderr


def test_the_end_scores_every_row_though_fewer_are_watched(folder, tmp_path):
    result = train(small_config(folder, eval__max_rows=5), tmp_path / 'run')
    records = read(tmp_path / 'run' / 'metrics.jsonl')
    watched, final = last(records, kind='eval'), last(records, kind='final')
    assert watched['step'] == final['step'] == STEPS and watched['tokens'] < final['tokens']
    whole = last(read(folder / 'whole' / 'metrics.jsonl'), kind='final')
    for key in ('loss', 'tokens', 'bytes', 'bits_per_byte'):
        assert final[key] == whole[key] == result.metrics[key]


# ----- going on -----


def test_going_on_from_a_checkpoint_ends_bit_for_bit_alike(folder, tmp_path):
    workdir = copy_of(folder, tmp_path, 4)
    train(small_config(folder, log__tensorboard=True), workdir)
    assert outcome(workdir) == outcome(folder / 'whole')


def test_killed_between_the_last_save_and_its_pruning_it_prunes_when_it_goes_on(folder, tmp_path):
    workdir = copy_of(folder, tmp_path, STEPS)
    lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (workdir / 'metrics.jsonl').write_text(''.join(line for line in lines if '"done"' not in line))
    result = train(small_config(folder, checkpoint__keep_last=1), workdir)
    assert result.exit_code == Exit.DONE and [path.name for path in (workdir / 'checkpoints').iterdir()] == [str(STEPS)]


@pytest.mark.parametrize('number, step', STOPS)
def test_a_signal_saves_and_the_next_start_goes_on(folder, tmp_path, monkeypatch, number, step, capfd):
    handlers = [signal.getsignal(n) for n in STOPPING]
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        result = train(small_config(folder), tmp_path / 'run')
    # The signal came while the metrics of a step were read, when the next one was under way.
    assert result == Result(Exit.STOPPED, min(step + 1, STEPS))
    assert [signal.getsignal(n) for n in STOPPING] == handlers
    assert last(read(tmp_path / 'run' / 'metrics.jsonl'), kind='run')['event'] == 'stopped'
    assert (tmp_path / 'run' / 'checkpoints' / str(result.step)).is_dir()
    assert signal.Signals(number).name in capfd.readouterr().err
    train(small_config(folder), tmp_path / 'run')
    assert outcome(tmp_path / 'run') == outcome(folder / 'whole')


def test_stopped_before_the_first_step_it_says_that_nothing_is_saved(folder, tmp_path, monkeypatch, capsys):
    class Asked(StopRequest):
        def __enter__(self):
            self.requested = True
            return self

    monkeypatch.setattr(train_module, 'StopRequest', Asked)
    assert train(small_config(folder), tmp_path / 'run') == Result(Exit.STOPPED, 0)
    assert 'nothing is saved' in capsys.readouterr().out
    assert Checkpoints(tmp_path / 'run' / 'checkpoints', read_only=True).steps() == []


def test_a_signal_during_an_evaluation_leaves_it_to_the_next_start(folder, tmp_path, monkeypatch):
    original = train_module.score

    def interrupted(eval_batch, rows, step):
        signal.raise_signal(signal.SIGTERM)
        return original(eval_batch, rows, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, 'score', interrupted)
        assert train(small_config(folder), tmp_path / 'run') == Result(Exit.STOPPED, 4)
    assert last(read(tmp_path / 'run' / 'metrics.jsonl'), kind='eval') is None
    train(small_config(folder), tmp_path / 'run')
    assert outcome(tmp_path / 'run') == outcome(folder / 'whole')
    for workdir in (tmp_path / 'run', folder / 'whole'):
        losses = Checkpoints(workdir / 'checkpoints', read_only=True)._losses
        assert losses == {r['step']: r['loss'] for r in read(workdir / 'metrics.jsonl') if r['kind'] == 'eval'}


def test_a_damaged_newest_checkpoint_costs_only_time(folder, tmp_path, capsys):
    workdir = tmp_path / 'run'
    shutil.copytree(folder / 'whole', workdir)
    lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (workdir / 'metrics.jsonl').write_text(''.join(lines[:-1]) + '{"kind": "ru')  # killed before it was done
    file = max((workdir / 'checkpoints' / '8' / 'model').rglob('d/*'), key=lambda path: path.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))
    train(small_config(folder), workdir)
    said = capsys.readouterr().out
    assert 'checkpoint 8 is damaged' in said and 'using checkpoint 4' in said
    assert outcome(workdir) == outcome(folder / 'whole')


def test_when_no_checkpoint_is_left_it_refuses_to_begin_anew(folder, tmp_path):
    workdir = copy_of(folder, tmp_path, 4)
    shutil.rmtree(workdir / 'checkpoints')
    with pytest.raises(UserError, match='no intact checkpoint'):
        train(small_config(folder), workdir)
    assert last(read(workdir / 'metrics.jsonl'), kind='train')['step'] == 4


def test_going_on_on_another_mesh(folder, tmp_path):
    assert jax.device_count() == 8
    workdir = copy_of(folder, tmp_path, 4)
    train(small_config(folder, mesh__fsdp=4, mesh__data=2), workdir)
    for ours, theirs in zip(outcome(workdir)[:-1], outcome(folder / 'whole')[:-1], strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-3)


# ----- what may not be -----


def test_another_configuration_is_refused_with_what_differs(folder, tmp_path):
    workdir = copy_of(folder, tmp_path, 4)
    with pytest.raises(UserError, match=r'optim\.learning_rate 0\.004 -> 0\.001, train\.steps 8 -> 9') as error:
        train(small_config(folder, optim__learning_rate=1e-3, train__steps=9, log__every=2), workdir)
    assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='train'):  # a finished run likewise
        train(small_config(folder, train__batch_size=16), folder / 'whole')


def test_a_run_without_a_step_may_be_begun_with_another_configuration(folder, tmp_path):
    Workdir(tmp_path).commit(configs.validate(small_config(folder, seed=5)), '{}')
    Workdir(tmp_path).require_same(configs.validate(small_config(folder)))


def test_two_processes_cannot_train_in_one_workdir(folder, tmp_path):
    with (
        Workdir(tmp_path / 'run').locked(),
        pytest.raises(UserError, match='another process is training'),
    ):
        train(small_config(folder), tmp_path / 'run')


@pytest.mark.parametrize(
    'overrides, message',
    [
        ({'model__vocab_size': 299}, r'300 tokens.*model\.vocab_size=299'),
        ({'train__batch_size': 12}, 'divide'),
        ({'data__sources': ('files:/nowhere/*.txt',)}, '/nowhere'),
        ({'train__init_from': '/nowhere'}, '/nowhere'),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(folder, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        train(small_config(folder, **overrides), tmp_path / 'run')
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()
    if 'train__init_from' not in overrides:
        assert not (tmp_path / 'run').exists()


def test_a_run_goes_on_with_its_own_tokens_and_without_them_refuses_other_text(folder, tmp_path, capsys):
    """Whatever becomes of the text: what counts is the hash of the tokens that were prepared."""
    config = small_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2, signal.SIGTERM)
        train(config, tmp_path / 'run')
    write_corpus(tmp_path / 'corpus', seed=1)
    shutil.copytree(tmp_path / 'run', tmp_path / 'other')
    capsys.readouterr()
    assert train(config, tmp_path / 'run').exit_code == Exit.DONE
    assert 'corpus/*.txt: changed since' in capsys.readouterr().err
    shutil.rmtree(config.data.cache_dir)
    before = contents(tmp_path / 'other')
    with pytest.raises(UserError, match='data'):
        train(config, tmp_path / 'other')
    assert contents(tmp_path / 'other') == before


def test_text_that_was_copied_but_not_changed_goes_on(folder, tmp_path):
    config = small_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2, signal.SIGTERM)
        train(config, tmp_path / 'run')
    for path in (tmp_path / 'corpus').iterdir():
        path.touch()
    shutil.rmtree(config.data.cache_dir)  # it is prepared anew, and is the data of the run all the same
    assert train(config, tmp_path / 'run').exit_code == Exit.DONE


def test_the_final_scores_cover_all_rows_whatever_was_watched_before_an_interruption(folder, tmp_path):
    workdir = copy_of(folder, tmp_path, 4)
    fewer = small_config(folder, eval__max_rows=2)
    with pytest.MonkeyPatch.context() as patch:
        original = train_module.score
        interrupt = lambda b, rows, step: signal.raise_signal(signal.SIGTERM) or original(b, rows, step)
        patch.setattr(
            train_module, 'score', lambda b, rows, step: (interrupt if rows.num_rows > 2 else original)(b, rows, step)
        )
        assert train(fewer, workdir).exit_code == Exit.STOPPED
    result = train(small_config(folder), workdir)
    assert result.metrics == train(small_config(folder), folder / 'whole').metrics


def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_later(folder, tmp_path, monkeypatch):
    original = Checkpoints.save

    def full(self, state, meta, *rest):
        if meta.step == 8:
            with self._explained(meta.step):
                raise OSError(errno.ENOSPC, 'No space left on device')
        original(self, state, meta, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, 'save', full)
        with pytest.raises(UserError, match=r'cannot save checkpoint 8.*No space left.*checkpoint 4 is intact'):
            train(small_config(folder), tmp_path / 'run')
    train(small_config(folder), tmp_path / 'run')
    assert outcome(tmp_path / 'run') == outcome(folder / 'whole')


def test_steps_that_stay_not_finite_abort_and_spare_the_checkpoints(folder, tmp_path, capsys):
    config = small_config(
        folder, optim__learning_rate=1e30, train__max_bad_steps=3, checkpoint__every=1, optim__clip_norm=0.0
    )
    result = train(config, tmp_path / 'run')
    assert result.exit_code == Exit.ABORTED
    records = read(tmp_path / 'run' / 'metrics.jsonl')
    bad = [r['step'] for r in records if r['kind'] == 'train' and r['bad']]
    assert bad == list(range(bad[0], bad[0] + 3))
    assert f'in 3 steps in a row, {bad[0]} to {bad[-1]}' in capsys.readouterr().out
    saved = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir()]
    assert max(saved) == bad[0] - 1
    aborted = last(records, kind='run')
    assert (aborted['event'], aborted['first_bad_step'], aborted['last_bad_step']) == ('aborted', bad[0], bad[-1])


# ----- profiles -----


def test_a_profile_is_written_when_asked_for(folder, tmp_path):
    train(small_config(folder, train__steps=4, log__profile_start=2, log__profile_steps=2), tmp_path / 'run')
    assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))


def test_a_profile_that_cannot_be_written_is_said_before_the_first_step_or_ends_nothing(folder, tmp_path, monkeypatch):
    options = {'train__steps': 2, 'checkpoint__every': 2, 'log__profile_start': 1, 'log__profile_steps': 1}
    config = small_config(folder, **options)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'profile').symlink_to(tmp_path / 'unmounted')
    with pytest.raises(UserError, match=r'profile is a link to .*unmounted.*mount'):
        train(config, tmp_path / 'run')
    assert not any(record['kind'] == 'train' for record in read(tmp_path / 'run' / 'metrics.jsonl'))

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    # What the profiler says when it begins, and when it writes.
    for part, name in ((full, 'start_trace'), (full, 'stop_trace')):
        said: list[str] = []
        trace = Trace(config.log, tmp_path / 'profile', said.append)
        with monkeypatch.context() as patch:
            patch.setattr(jax.profiler, 'start_trace', lambda folder: None)
            patch.setattr(jax.profiler, name, part)
            assert trace.begins_after(0) and trace.ends_after(1)
            trace.begin()
            trace.end()
            trace.end()
        (line,) = said
        assert line.startswith(f'no profile in {tmp_path / "profile"}: OSError: ') and 'No space left' in line
