"""Synthetic tasks: every example is solved by a reader that goes through its tokens one by one."""

import itertools

import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax.config import ConfigError
from mixcon_jax.data import Share, synthetic
from mixcon_jax.data.synthetic import ASK, NOISE, SYMBOLS, Draws, SyntheticHeldout, SyntheticTrain

TASKS = tuple(synthetic.TASKS)


def make_config(task, **options):
    config = configs.default()
    config.data.sources = (f'synthetic:{task}',)
    config.data.seq_len = 32
    config.train.batch_size = 6
    config.data.synthetic.update({'symbols': 16, 'num_items': 5, 'eval_rows': 9} | options)
    return configs.validate(config)


def copied(tokens):
    """The answers of selective copying: the symbols that are no noise, in order."""
    return {i + np.flatnonzero(tokens == ASK)[0]: s for i, s in enumerate(t for t in tokens if t >= SYMBOLS)}


def induced(tokens):
    """The answer of induction: what followed ASK the last time."""
    first, last = np.flatnonzero(tokens == ASK)
    return {last: tokens[first + 1]}


def recalled(tokens):
    """The answers of recall: keys seen for the second time ask for the token after their first."""
    memory, answers = {}, {}
    for place, token in enumerate(tokens):
        if token == NOISE or token >= SYMBOLS + 8:
            continue
        if token in memory:
            answers[place] = memory[token]
        else:
            memory[token] = tokens[place + 1]
    return answers


SOLVERS = {'selective_copying': copied, 'induction': induced, 'mqar': recalled}


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('length, items', [(20, 5), (32, 5), (33, 1), (200, 8)])
@pytest.mark.parametrize('task', TASKS)
def test_every_answer_follows_from_the_tokens_before_it(task, length, items, seed):
    tokens, targets, mask = synthetic.TASKS[task].make(Draws(seed), 20, length, items, 16, 64)
    assert tokens.shape == targets.shape == mask.shape == (20, length)
    for row, wanted, scored in zip(tokens, targets, mask, strict=True):
        answers = SOLVERS[task](row)
        assert len(answers) == (1 if task == 'induction' else items)
        assert {place: wanted[place] for place in np.flatnonzero(scored)} == answers
        for place in answers:  # what comes later is not needed
            assert SOLVERS[task](row[: place + 1])[place] == wanted[place]
    assert tokens.max() < SYMBOLS + 16


@pytest.mark.parametrize('task', TASKS)
def test_symbols_and_places_are_drawn_evenly(task):
    tokens, targets, mask = synthetic.TASKS[task].make(Draws(7), 4000, 24, 4, 8, 24)
    low = SYMBOLS + (4 if task == 'mqar' else 0)
    counts = np.bincount(targets[mask], minlength=SYMBOLS + 8)[low : SYMBOLS + 8]
    assert np.abs(counts / counts.mean() - 1).max() < 0.15
    used = (tokens != NOISE).sum(0)
    assert (used[::2] > 0).all(), 'some place is never used'


@pytest.mark.parametrize('length', [64, 128])
def test_queries_come_soon_at_trained_lengths_and_anywhere_at_longer_ones(length):
    _, _, mask = synthetic.mqar(Draws(1), 5000, length, 4, 8, 64)
    share = mask.sum(0)[8::2] / mask.sum()
    assert not mask[:, 9::2].any(), 'every query is followed by noise'
    if length > 64:
        assert np.abs(share * len(share) - 1).max() < 0.15
    else:
        assert share[0] > 3 * share[10] and share[20:].sum() > 0.05


@pytest.mark.parametrize('task', TASKS)
def test_keys_and_values_are_distinct_and_the_floors_are_what_they_say(task):
    config = make_config(task, num_items=8, eval_rows=400, eval_lengths=(48,))
    rows = [
        targets[mask]
        for batch in SyntheticHeldout(config, 50)
        for targets, mask in zip(batch['targets'], batch['loss_mask'], strict=True)
    ]
    commonest = sum((answers == np.bincount(answers).argmax()).sum() for answers in rows)
    floors = synthetic.baselines(config)
    assert floors['chance'] == 1 / (8 if task == 'mqar' else 16)
    if task == 'induction':
        assert 'context' not in floors
    else:
        assert floors['context'] == commonest / sum(map(len, rows))
    if task == 'mqar':
        assert floors['context'] == floors['chance'], 'all values are there, each once'
        assert all(len(set(answers)) == 8 for answers in rows)


@pytest.mark.parametrize('curriculum', [0, 10])
@pytest.mark.parametrize('task', TASKS)
def test_batches_depend_on_seed_and_step_alone_and_split_over_processes(task, curriculum):
    config = make_config(
        task, **({'min_items': 1, 'min_length': 8, 'curriculum_steps': curriculum} if curriculum else {})
    )
    whole = SyntheticTrain(config)
    other = SyntheticTrain(
        make_config(task, **({'min_items': 1, 'min_length': 8, 'curriculum_steps': curriculum} if curriculum else {}))
    )
    parts = [SyntheticTrain(config, Share((index,), 3)) for index in range(3)]
    iterator = whole.iterate(4)
    for step in (4, 5, 6):
        batch = next(iterator)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[step][name])
            np.testing.assert_array_equal(array, np.concatenate([part[step][name] for part in parts]))
    assert (whole[4]['tokens'] != whole[5]['tokens']).any()
    config.seed = 1
    assert (SyntheticTrain(config)[4]['tokens'] != whole[4]['tokens']).any()


@pytest.mark.parametrize('task', TASKS)
def test_the_curriculum_grows_and_packs_sequences_as_documents(task):
    train = SyntheticTrain(make_config(task, num_items=8, min_items=1, min_length=6, curriculum_steps=100))
    grown = [train.difficulty(step) for step in range(0, 140, 7)]
    assert grown[0] == (6, 1) and grown[-1] == (32, 8)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(grown))
    for step in (0, 40, 99, 200):
        batch, (length, items) = train[step], train.difficulty(step)
        documents = 32 // length
        assert batch['segment_ids'].max() == documents
        for document in range(documents):
            inside = slice(document * length, (document + 1) * length)
            assert (batch['segment_ids'][:, inside] == document + 1).all()
            np.testing.assert_array_equal(batch['positions'][:, inside], np.tile(np.arange(length), (6, 1)))
            for row in range(6):
                answers = SOLVERS[task](batch['tokens'][row, inside])
                assert len(answers) == (1 if task == 'induction' else items)
                scored = np.flatnonzero(batch['loss_mask'][row, inside])
                assert {place: batch['targets'][row, inside][place] for place in scored} == answers
        rest = batch['segment_ids'][:, documents * length :]
        assert not rest.any() and not batch['loss_mask'][:, documents * length :].any()


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('task', TASKS)
def test_heldout_sequences_are_scored_once_at_every_length(task, processes):
    config = make_config(task, eval_lengths=(48, 20, 32))
    shares = [SyntheticHeldout(config, 4, share=Share((i,), processes)) for i in range(processes)]
    rows: dict[int, list] = {}
    answers = 0
    for batches in zip(*shares, strict=True):
        for batch in batches:
            assert len(batch['tokens']) == 4 // processes
            real = batch['segment_ids'][:, 0] > 0
            rows.setdefault(batch['tokens'].shape[1], []).extend(map(tuple, batch['tokens'][real]))
            answers += batch['loss_mask'].sum()
            assert not batch['loss_mask'][~real].any()
    assert sorted(rows) == [20, 32, 48]
    assert all(len(found) == 9 and len(set(found)) == 9 for found in rows.values())
    assert answers == shares[0].num_tokens == 3 * 9 * (1 if task == 'induction' else 5)
    fewer = SyntheticHeldout(config, 4, max_rows=4)
    assert sum(1 for _ in fewer) == 3


@pytest.mark.parametrize('task', TASKS)
def test_heldout_sequences_do_not_depend_on_the_batch_size(task):
    config = make_config(task, eval_lengths=(48, 32))

    def rows(size):
        return [tuple(row) for batch in SyntheticHeldout(config, size) for row in batch['tokens'] if row.any()]

    assert rows(4) == rows(9) == rows(1)


def test_the_tokenizer_names_symbols_and_reads_its_own_text():
    config = make_config('mqar')
    tokenizer = synthetic.tokenizer(config.data)
    ids = [NOISE, ASK, SYMBOLS, SYMBOLS + 15]
    assert tokenizer.decode(ids) == '_ ? s0 s15' and tokenizer.encode('_ ? s0 s15') == ids
    assert tokenizer.vocab_size == SYMBOLS + 16


@pytest.mark.parametrize(
    'task, change, message',
    [
        ('mqar', {'data.synthetic.num_items': 9}, r'num_items=9 .* at least 18 symbols'),
        ('mqar', {'data.seq_len': 14}, r'data.seq_len: 14 .* with 5 items; take at least 20'),
        ('selective_copying', {'data.synthetic.eval_lengths': (64, 9)}, r'eval_lengths: 9 .* at least 10'),
        (
            'selective_copying',
            {'data.synthetic.min_length': 4, 'data.synthetic.min_items': 3, 'data.synthetic.curriculum_steps': 9},
            r'min_length: 4 .* 6',
        ),
        ('mqar', {'data.synthetic.min_items': 3}, r'min_items=3 does nothing without data.synthetic.curriculum_steps'),
        (
            'induction',
            {'data.synthetic.min_length': 64, 'data.synthetic.curriculum_steps': 9},
            r'64 exceeds data.seq_len=32',
        ),
        ('induction', {'data.synthetic.min_items': 6, 'data.synthetic.curriculum_steps': 9}, r'min_items=6 exceeds'),
        ('induction', {'data.sources': ('synthetic:induction', 'stdlib')}, r'cannot be mixed'),
        ('induction', {'data.sources': ('synthetic:copying',)}, r'is no task; known: selective_copying'),
    ],
)
def test_impossible_options_are_refused(task, change, message):
    config = make_config(task)
    for key, value in change.items():
        configs.put(config, key, value)
    with pytest.raises(ConfigError, match=message):
        configs.validate(config)
