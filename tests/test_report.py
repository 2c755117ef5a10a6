"""Reports: what counts as an arm, what enters a mean, what differences are worth, and what lands on the disk."""

import csv
import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mixcon_jax import config as configs
from mixcon_jax.errors import UserError
from mixcon_jax.models import accounting
from mixcon_jax.reports import comparison, curves
from mixcon_jax.reports.arms import group, numeric_axis
from mixcon_jax.reports.report import collect, report
from mixcon_jax.reports.runs import find
from mixcon_jax.runs import saved
from mixcon_jax.runs.records import plain

STEPS, EVERY, TOKENS = 40, 10, 128  # of the runs below: steps, steps between evaluations, tokens a step
BYTES, START = 4000, 1_700_000_000.0


def write_run(folder: Path, losses=(3.0, 2.5, 2.2, 2.0), end: str = 'done', final=None, **changes) -> Path:
    """Writes a run directory by hand.

    Args:
      folder: where.
      losses: held-out loss after every tenth step; the last is the final one too, unless ``final`` gives scores.
      end: event of the last ``run`` record; '' for a run that is going on.
      final: fields of the final record that differ.
      changes: options, dots doubled underscores: ``optim__learning_rate=1e-3``; ``started`` is the time.
    """
    started = changes.pop('started', START)
    config = json.loads(base_config())
    for key, value in changes.items():
        *groups, last = key.split('__')
        functools.reduce(dict.__getitem__, groups, config)[last] = value
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    lines = [{'kind': 'run', 'step': 0, 'event': 'started', 'devices': 1}]
    for number, loss in enumerate(losses, 1):
        step, tokens = number * EVERY, number * EVERY * TOKENS
        rate = 100.0 * number
        lines.append(
            {'kind': 'train', 'step': step, 'loss': loss + 0.1, 'tokens_seen': tokens, 'tokens_per_second': rate}
        )
        lines.append({'kind': 'eval', 'step': step, **scores(loss, tokens=500)})
    made = len(losses) * EVERY
    if end == 'done':
        lines.append({'kind': 'final', 'step': made, **scores(losses[-1]), **(final or {})})
    if end:
        shown = {**scores(losses[-1]), 'fingerprint': 'f'} if end == 'done' else {}
        tokens, seconds = made * TOKENS, 60.0
        lines.append({'kind': 'run', 'step': made, 'event': end, 'tokens_seen': tokens, 'seconds': seconds, **shown})
    text = ''.join(json.dumps(plain({'time': started + index, **line})) + '\n' for index, line in enumerate(lines))
    (folder / 'metrics.jsonl').write_text(text)
    return folder


def write_checkpoint(run: Path, tokens: list[str]) -> None:
    """What a report reads of the checkpoint of a run's end, which is whole as far as it looks."""
    config = json.loads((run / 'config.json').read_text())
    folder = run / 'checkpoints' / str(config['train']['steps'])
    contents = {'step': config['train']['steps'], 'config': config, 'data': tokens}
    for name, text in (
        ('meta/metadata', json.dumps({'sha256': saved.digest(contents), 'contents': contents})),
        ('model/manifest.ocdbt', 'x'), ('optimizer/manifest.ocdbt', 'x'),
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)


@functools.cache
def base_config() -> str:
    """A small model's configuration as JSON; widths of 0 are derived by whoever reads it."""
    config = configs.default()
    config.model.dim = 16
    config.model.vocab_size = 300
    config.model.pattern = ('conba+moe', 'attention+mlp')
    config.model.attention.num_heads = 2
    config.data.seq_len = 32
    config.train.steps = STEPS
    return configs.to_json(config)


def scores(loss: float, tokens: int = 1000) -> dict:
    bits = loss * 1000 / math.log(2) / BYTES
    return {'loss': loss, 'perplexity': math.exp(loss), 'bits_per_byte': bits, 'tokens': tokens, 'bytes': BYTES}


def curve(last: float) -> tuple[float, ...]:
    return (last + 1.0, last + 0.5, last + 0.2, last)


def sweep(top: Path, table: dict[str, list[float]], key: str = 'optim__weight_decay', values=None) -> Path:
    """Runs of several arms, ``{name: final loss of seed 0, 1, ...}``, started seed by seed in the table's order."""
    for number, (name, finals) in enumerate(table.items()):
        value = values[number] if values else 0.1 * (number + 1)
        for seed, loss in enumerate(finals):
            started = START + 1000 * (len(table) * seed + number)
            write_run(top / name / f'seed-{seed}', curve(loss), name=name, seed=seed, started=started, **{key: value})
    return top


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# ----- arms ---------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_seed_and_free_options_are_one_arm(tmp_path):
    write_run(tmp_path / 'a', seed=0, name='a')
    write_run(tmp_path / 'b', seed=1, name='a', log__every=3, eval__every=7, mesh__cpu_devices=2, data__cache_dir='/x')
    write_run(tmp_path / 'c', seed=0, name='c', optim__betas=(0.8, 0.9), started=START + 5)
    arms = collect([tmp_path]).arms
    assert [(arm.label, [run.seed for run in arm.runs]) for arm in arms] == [('a', [0, 1]), ('c', [0])]
    assert [arm.options for arm in arms] == [{'optim.betas': (0.9, 0.95)}, {'optim.betas': (0.8, 0.9)}]


def test_arms_come_in_the_order_of_their_first_seeds_start(tmp_path):
    sweep(tmp_path, {'z': [2.0, 2.1], 'a': [2.0, 2.1], 'm': [2.0]}, 'data__sources', [('x',), ('y',), ('w',)])
    assert [arm.label for arm in collect([tmp_path]).arms] == ['z', 'a', 'm']


def test_arms_that_share_a_name_are_told_apart_by_what_differs(tmp_path):
    write_run(tmp_path / '1', name='same', optim__weight_decay=0.1)
    write_run(tmp_path / '2', name='same', optim__weight_decay=0.2, started=START + 1)
    write_run(tmp_path / '3', name='other', train__batch_size=2, started=START + 2)
    labels = [arm.label for arm in collect([tmp_path]).arms]
    assert labels == ['same (weight_decay=0.1)', 'same (weight_decay=0.2)', 'other']
    for name in '45':
        rate = 1.23456701e-3 + 1e-11 * int(name)
        write_run(tmp_path / 'near' / name, name='a\nb', optim__learning_rate=rate, started=START + int(name))
    labels = [arm.label for arm in collect([tmp_path / 'near']).arms]
    assert labels == [r'a\nb (learning_rate=0.00123456705)', r'a\nb (learning_rate=0.00123456706)']


def test_arms_without_a_name_take_their_folders(tmp_path):
    write_run(tmp_path / 'low' / 'seed-0')
    write_run(tmp_path / 'low' / 'seed-1', seed=1)
    write_run(tmp_path / 'high', optim__weight_decay=0.2, started=START + 1)
    assert [arm.label for arm in collect([tmp_path]).arms] == ['low', 'high']


def test_one_number_that_differs_is_an_axis_and_what_follows_from_it_is_not_shown(tmp_path):
    for dim in (64, 16, 32):  # head_dim, dt_rank and the FFN's widths follow
        write_run(tmp_path / f'd{dim}', name=f'd{dim}', model__dim=dim)
    arms = collect([tmp_path]).arms
    assert [arm.options for arm in arms] == [{'model.dim': 16}, {'model.dim': 32}, {'model.dim': 64}]
    assert numeric_axis(arms) == 'model.dim'
    write_run(tmp_path / 'wide', name='wide', model__mlp__hidden_dim=80)
    arms = collect([tmp_path]).arms
    assert set(arms[0].options) >= {'model.dim', 'model.mlp.hidden_dim'}, 'now it is a choice'
    assert numeric_axis(arms) is None


def test_lists_that_follow_from_one_number_are_not_shown(tmp_path):
    for number, kernel in enumerate((5, 31)):
        write_run(tmp_path / str(number), started=START + number, model__large_kernel__kernel=kernel)
    assert [arm.options for arm in collect([tmp_path]).arms] == [{'model.large_kernel.kernel': n} for n in (5, 31)]


def test_arms_with_named_layers_differ_in_what_they_give(tmp_path):
    """An expert's width follows from the named top_k; what an arm does not give is a dash."""
    pattern = ('conba+big', 'attention+mlp')
    for name, layers in {'none': {}, 'one': {'top_k': 1}, 'two': {'top_k': 2}}.items():
        given = {'model__layers': {'big': {'kind': 'moe', **layers}}, 'model__pattern': pattern} if layers else {}
        write_run(tmp_path / name, name=name, **given)
    arms = collect([tmp_path]).arms
    assert [arm.options['model.layers.big.top_k'] for arm in arms] == ['–', 1, 2]
    assert {key for arm in arms for key in arm.options} == {
        'model.pattern', 'model.layers.big.kind', 'model.layers.big.top_k',
    }  # fmt: skip
    assert [arm.options for arm in collect([tmp_path / 'one', tmp_path / 'two']).arms] == [
        {'model.layers.big.top_k': 1}, {'model.layers.big.top_k': 2},
    ]  # fmt: skip


def test_runs_of_the_same_tokens_are_of_the_same_text_wherever_it_lay(tmp_path):
    for seed, (place, tokens) in enumerate([('/old/*.txt', 'a'), ('/new/*.txt', 'a'), ('/new/*.txt', 'b')]):
        run = write_run(tmp_path / f'run-{seed}', seed=seed, data__sources=[f'files:{place}'])
        write_checkpoint(run, [tokens])
    arms, _ = group(find([tmp_path])[0])
    assert [[run.seed for run in arm.runs] for arm in arms] == [[0, 1], [2]]
    assert len({run.text for run in arms[0].runs}) == 1 and arms[0].runs[0].text != arms[1].runs[0].text


def test_weights_of_the_same_seed_of_another_sweep_make_no_new_arm(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f'{seed}', name='tuned', seed=seed, train__init_from=f'runs/base/seed-{seed}')
    assert len(collect([tmp_path]).arms) == 1


def test_a_copy_of_a_run_counts_once(tmp_path):
    write_run(tmp_path / 'one', (3.0,), end='', name='a')
    write_run(tmp_path / 'two', name='a')
    found = collect([tmp_path, tmp_path / 'two'])
    assert [str(run.path) for run in found.arms[0].runs] == [str(tmp_path / 'two')], 'the one that is done'
    assert any(str(tmp_path / 'one') in note for note in found.notes)


def test_sizes_are_those_of_the_model(tmp_path):
    arm = collect([write_run(tmp_path / 'run')]).arms[0]
    model = arm.config.model
    assert arm.costs.counts == accounting.parameter_count(model)
    assert arm.costs.flops_per_token == accounting.flops_per_token(model, 32)
    assert arm.costs.state_bytes == accounting.state_bytes(model, 32)
    assert arm.costs.state_bytes_long == accounting.state_bytes(model, 8192)
    assert arm.tokens_per_second == 250, 'the median of 100, 200, 300 and 400'


# ----- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pairs', [3, 5, 11])
@pytest.mark.parametrize('comparisons', [1, 4])
def test_paired_differences_equal_scipys(pairs, comparisons):
    rng = np.random.default_rng()
    base, ours = rng.normal(2.0, 0.1, pairs), rng.normal(2.05, 0.1, pairs)
    found = comparison.paired(dict(enumerate(ours)), dict(enumerate(base)), comparisons)
    test = stats.ttest_rel(ours, base)
    np.testing.assert_allclose(found.mean, np.mean(ours - base), rtol=1e-12)
    np.testing.assert_allclose(found.error, stats.sem(ours - base), rtol=1e-12)
    np.testing.assert_allclose(found.interval, test.confidence_interval(0.95), rtol=1e-9)
    np.testing.assert_allclose(found.strict, test.confidence_interval(1 - 0.05 / comparisons), rtol=1e-9)
    assert (found.verdict != 'not resolved') == (test.pvalue < 0.05)
    assert found.same_sign == np.sum((ours - base > 0) == (found.mean > 0))


def test_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t of 2 degrees of freedom 4.3027."""
    found = comparison.paired({0: 2.0, 1: 4.0, 2: 6.0, 7: 1.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: 1.0})
    assert found.n == 3 and found.mean == 2 and found.same_sign == 3
    assert found.interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert found.verdict == 'not resolved'


def test_few_pairs_have_no_interval():
    two = comparison.paired({0: 1.0, 1: 1.5}, {0: 2.0, 1: 2.0})
    assert two.interval is None and two.verdict == 'fewer than 3 pairs'
    assert two.mean == -0.75 and two.error == pytest.approx(0.25)
    one = comparison.paired({0: 1.0}, {0: 2.0})
    assert one.mean == -1 and math.isnan(one.error)
    none = comparison.paired({0: 1.0}, {1: 2.0})
    assert none.verdict == 'no pair' and math.isnan(none.mean)


def test_equal_scores_are_not_resolved():
    same = comparison.paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert same.interval == (0, 0) and same.verdict == 'not resolved'


def test_only_seeds_of_both_arms_make_pairs(tmp_path):
    sweep(tmp_path, {'base': [2.0, 2.1, 2.2, 2.3], 'less': [1.5, 1.61, 1.69], 'odd': [1.0, 3.2, 2.2]})
    found = collect([tmp_path])
    assert found.differences['less'].n == 3
    assert found.differences['less'].verdict == 'lower'
    assert found.differences['odd'].verdict == 'not resolved'
    assert any('different seeds' in note for note in found.notes)
    swapped = collect([tmp_path], 'less')
    assert swapped.differences['base'].verdict == 'higher'
    assert swapped.differences['base'].mean == pytest.approx(0.5)


def test_other_tokens_for_the_same_text_are_compared_by_bits_per_byte(tmp_path):
    write_run(tmp_path / 'a', name='a')
    write_run(tmp_path / 'b', name='b', data__tokenizer_vocab_size=4000, final={'tokens': 700, 'bits_per_byte': 1.0})
    found = collect([tmp_path])
    assert found.score is comparison.BITS
    assert found.differences['b'].mean == pytest.approx(1.0 - 2.0 * 1000 / math.log(2) / BYTES)


def test_other_text_is_not_compared(tmp_path):
    write_run(tmp_path / 'a', name='a')
    write_run(tmp_path / 'b', name='b', data__sources=('files:*.txt',), started=START + 1)
    write_run(tmp_path / 'c', name='c', final={'bytes': 7}, optim__eps=1e-3, started=START + 2)
    found = collect([tmp_path])
    assert [difference.verdict for difference in found.differences.values()] == ['no pair', 'no pair']
    assert 'scored on other text than a, so not compared: b, c' in found.notes


# ----- unfinished and damaged runs ----------------------------------------------------------------------------------


def test_only_runs_that_are_done_enter_means(tmp_path):
    write_run(tmp_path / 'done', name='a')
    write_run(tmp_path / 'running', (9.0, 8.0), end='', name='a', seed=1)
    write_run(tmp_path / 'stopped', (9.0,), end='stopped', name='a', seed=2)
    write_run(tmp_path / 'aborted', (9.0,), end='aborted', name='a', seed=3)
    write_run(tmp_path / 'started', (), end='', name='a', seed=4)
    write_run(tmp_path / 'empty', name='a', seed=5)
    (tmp_path / 'empty' / 'metrics.jsonl').write_text('')
    write_run(tmp_path / 'torn', (9.0, 7.0), end='', name='a', seed=6)
    with (tmp_path / 'torn' / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "eval", "step": 30, "lo')
    write_run(tmp_path / 'nan', name='a', seed=7, final={'loss': math.nan})
    found = collect([tmp_path])
    (arm,) = found.arms
    assert arm.finals('loss') == {0: 2.0}
    assert arm.states() == {'done': 2, 'aborted': 1, 'stopped': 1, 'unfinished': 4}
    assert any('seeds 3 ended because' in note for note in found.notes)
    assert any('seeds 7 are done but' in note for note in found.notes)
    assert not any('unreadable' in note for note in found.notes), 'a torn last line is no damage'
    page = report([tmp_path]).read_text()
    written = {row['path'].rsplit('/', 1)[-1]: row for row in rows(tmp_path / 'report' / 'runs.csv')}
    assert written['running']['final_loss'] == '' and written['running']['eval_loss'] == '8'
    assert written['torn']['eval_loss'] == '7' and written['torn']['step'] == '20'
    assert written['started']['eval_loss'] == '' and written['empty']['state'] == 'unfinished'
    assert '| a | 1 | unfinished | 20 of 40 | 20 | 8.0000 |' in page
    assert '| a | 4 | unfinished | 0 of 40 | – | – |' in page
    (row,) = rows(tmp_path / 'report' / 'arms.csv')
    assert float(row['loss_mean']) == 2 and row['loss_sd'] == '' and row['finished'] == '1'


def test_a_longer_run_that_resumed_is_not_done(tmp_path):
    write_run(tmp_path / 'run', (3.0, 2.0), name='a')  # done after 20 of 40 steps
    assert collect([tmp_path]).arms[0].runs[0].state == 'unfinished'


def test_damaged_runs_are_named_and_left_out(tmp_path):
    write_run(tmp_path / 'good', name='good')
    for name in ('json', 'list', 'option', 'value', 'binary', 'lost'):
        write_run(tmp_path / name, name=name)
    write_run(tmp_path / 'lines', name='lines', seed=1, optim__eps=1e-3)
    (tmp_path / 'json' / 'config.json').write_text('{"name": ')
    (tmp_path / 'list' / 'config.json').write_text('[1, 2]')
    (tmp_path / 'option' / 'config.json').write_text('{"modle": {"dim": 3}}')
    (tmp_path / 'value' / 'config.json').write_text('{"model": {"dim": "wide"}}')
    (tmp_path / 'binary' / 'metrics.jsonl').write_bytes(b'\x00\xff\n' * 5)
    (tmp_path / 'lost' / 'config.json').unlink()
    metrics = tmp_path / 'lines' / 'metrics.jsonl'
    metrics.write_text(metrics.read_text().replace('{"time"', '{"ti\nme"', 2) + '{"kind": 3, "step": "x"}\n')
    found = collect([tmp_path])
    assert sorted(arm.label for arm in found.arms) == ['good', 'lines']
    left_out = '\n'.join(note for note in found.notes if note.startswith('left out'))
    for name in ('json', 'list', 'option', 'value', 'lost'):
        assert str(tmp_path / name / 'config.json') in left_out
    assert str(tmp_path / 'binary' / 'metrics.jsonl') in left_out
    assert left_out.count('\n') == 5
    assert any(note == f'{metrics}: 5 unreadable lines passed over' for note in found.notes)


def test_without_any_readable_run_one_line_says_so(tmp_path):
    with pytest.raises(UserError, match='no run found'):
        collect([tmp_path])
    write_run(tmp_path / 'bad')
    (tmp_path / 'bad' / 'config.json').write_text('{')
    with pytest.raises(UserError, match=r'no run found in .*1 left out, .*bad/config\.json'):
        collect([tmp_path])
    with pytest.raises(UserError, match='/nowhere is not a folder'):
        collect([tmp_path, '/nowhere'])


# ----- curves -------------------------------------------------------------------------------------------------------


def test_tokens_are_interpolated_between_records(tmp_path):
    (run,) = collect([write_run(tmp_path / 'run')]).arms[0].runs
    assert [run.tokens_at(step) for step in (0, 5, 10, 40, 80)] == [0, 640, 1280, 5120, 10240]
    assert run.tokens_seen == 5120


def test_the_mean_curve_is_over_finished_runs_at_their_common_steps(tmp_path):
    write_run(tmp_path / '0', (4.0, 3.0, 2.0, 1.0), name='a')
    write_run(tmp_path / '1', (6.0, 5.0, 4.0, 3.0), name='a', seed=1)
    write_run(tmp_path / '2', (9.0,), end='', name='a', seed=2)
    arm = collect([tmp_path]).arms[0]
    assert curves.mean(arm, curves.heldout) == {10: (1280, 5), 20: (2560, 4), 30: (3840, 3), 40: (5120, 2)}
    metrics = tmp_path / '1' / 'metrics.jsonl'
    metrics.write_text(''.join(line for line in metrics.open() if not re.search('"eval", "step": [13]0', line)))
    arm = collect([tmp_path]).arms[0]
    assert curves.mean(arm, curves.heldout) == {20: (2560, 4), 40: (5120, 2)}


def test_the_training_loss_is_averaged_over_a_twentieth_of_the_run(tmp_path):
    folder = write_run(tmp_path / 'run', (), end='')
    loss = np.random.default_rng().normal(3, 1, 60)
    with (folder / 'metrics.jsonl').open('a') as file:
        for step, value in enumerate(loss, 1):
            file.write(json.dumps({'kind': 'train', 'step': step, 'loss': value, 'tokens_seen': 10 * step}) + '\n')
    smooth = curves.training(collect([tmp_path]).arms[0].runs[0])
    np.testing.assert_allclose(smooth[1], (10, loss[0]))
    np.testing.assert_allclose(smooth[2], (20, loss[:2].mean()))
    np.testing.assert_allclose(smooth[60], (600, loss[-3:].mean()))
