"""Batches: every target once, the same batch from any start, process count and thread count, exact mixtures."""

import hashlib
import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcon_jax.data import HeldoutBatches, Share, TokenStore, TrainBatches, heldout_from_texts, prepare
from mixcon_jax.data.documents import Document
from mixcon_jax.data.loader import Mixture
from mixcon_jax.data.packing import Rows
from mixcon_jax.errors import UserError
from tests.data.cases import make_texts, write_jsonl


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def take(iterator, count: int) -> list:
    return [next(iterator) for _ in range(count)]


def scored_spans(batches) -> Counter:
    """How often each span of targets occurs, by walking the batches token by token."""
    spans = Counter()
    for batch in batches:
        for row in range(batch['tokens'].shape[0]):
            mask, segments = batch['loss_mask'][row], batch['segment_ids'][row]
            assert np.array_equal(mask, segments > 0)
            for segment in set(segments[mask].tolist()):
                at = segments == segment
                assert batch['positions'][row, at].tolist() == list(range(at.sum()))
                # Within a span each target is the next input.
                assert np.array_equal(batch['targets'][row, at][:-1], batch['tokens'][row, at][1:])
                spans[(batch['tokens'][row, at][0], *batch['targets'][row, at].tolist())] += 1
    return spans


@pytest.mark.parametrize('packing', [True, False])
@pytest.mark.parametrize('seq_len', [3, 16, 61])
def test_an_epoch_has_every_training_target_once(make_config, corpus, packing, seq_len):
    config = make_config(corpus[1], batch_size=1, packing=packing, seq_len=seq_len)
    [prepared] = prepare(config.data, progress=False)
    batches, store = TrainBatches(config, [prepared]), prepared.open('train')
    documents = store.read_many(store.starts, store.starts + store.lengths)
    pairs = Counter()  # (target before, target), which knows the order too
    for document in documents:
        whole = [store.eot_id, *document.tolist(), store.eot_id]
        pairs.update(itertools.pairwise(whole))
    rows = batches.rows[0].num_rows
    for epoch in range(2):
        got, scored = Counter(), 0
        for index in range(epoch * rows, (epoch + 1) * rows):
            batch = batches[index]
            mask = batch['loss_mask']
            scored += int(mask.sum())
            got.update(zip(batch['tokens'][mask].tolist(), batch['targets'][mask].tolist(), strict=True))
        assert scored == batches.num_tokens == store.num_targets
        assert got == pairs
    spans = scored_spans(batches[index] for index in range(rows))
    assert sum(len(span) - 1 for span in spans.elements()) == store.num_targets


def test_the_order_of_data_stays_what_it_is(make_config):
    """A run continued after an upgrade must see the batches that it would have seen: this hash may not change."""
    stores = []
    for source in range(2):
        documents = [np.arange(1, 2 + (7 * i + source) % 23, dtype=np.uint16) for i in range(50)]
        stores.append(TokenStore.from_documents(documents, 1, 0))
    batches = TrainBatches(make_config('a', 'b', seed=11, weights=(0.3, 0.7)), stores)
    digest = hashlib.sha256()
    for index in (0, 1, 50, 10**9):
        for name, values in sorted(batches[index].items()):
            digest.update(name.encode() + values.astype('<i4').tobytes())
    assert digest.hexdigest()[:16] == '91afead118681f63'


@pytest.mark.parametrize('packing', [True, False])
@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_every_heldout_target_is_scored_once(make_config, tmp_path, packing, batch_size):
    specs = [f'files:{write_jsonl(tmp_path / f"{i}.jsonl", make_texts(25, seed=i))}' for i in range(2)]
    config = make_config(*specs, packing=packing)
    stores = prepare(config.data, progress=False)
    held = HeldoutBatches(config, stores, batch_size)
    batches = list(held)
    assert len(batches) == len(held)
    assert {batch['tokens'].shape for batch in batches} == {(batch_size, 16)}
    expected, num_bytes = [], 0
    tokenizer = stores[0].load_tokenizer()
    for prepared in stores:
        store = prepared.open('heldout')
        for document in store.read_many(store.starts, store.starts + store.lengths):
            expected += [*document.tolist(), store.eot_id]
            num_bytes += len(tokenizer.decode(document).encode())
    # In the order of the stores, so the targets of all batches are the documents one after the other.
    got = np.concatenate([batch['targets'][batch['loss_mask']] for batch in batches])
    assert got.tolist() == expected
    assert held.num_tokens == len(expected) and held.num_bytes == num_bytes
    assert sum(batch['loss_mask'].any(1).sum() for batch in batches) == held.num_rows
    assert all(same(a, b) for a, b in zip(batches, held, strict=True))  # it can be walked again


def test_heldout_rows_may_be_limited(make_config, corpus):
    config = make_config(corpus[1])
    stores = prepare(config.data, progress=False)
    whole = HeldoutBatches(config, stores, 2)
    assert whole.num_rows > 5
    some = HeldoutBatches(config, stores, 2, max_rows=5)
    batches = list(some)
    assert some.num_rows == 5 and len(batches) == 3
    assert some.num_tokens == sum(int(batch['loss_mask'].sum()) for batch in batches) < whole.num_tokens
    assert some.num_bytes == pytest.approx(whole.num_bytes * some.num_tokens / whole.num_tokens)
    assert HeldoutBatches(config, stores, 2, max_rows=10**6).num_bytes == whole.num_bytes
    assert HeldoutBatches(config, stores, 0).batch_size == config.train.batch_size


@pytest.mark.parametrize('threads, prefetch', [(1, 0), (1, 1), (2, 3), (7, 8)])
def test_batches_do_not_depend_on_start_threads_or_processes(make_config, tmp_path, threads, prefetch):
    specs = [f'files:{write_jsonl(tmp_path / f"{i}.jsonl", make_texts(9, seed=i))}' for i in range(3)]
    config = make_config(*specs, batch_size=6, seed=3, seq_len=33, num_threads=threads, prefetch=prefetch)
    stores = prepare(config.data, progress=False)
    reference = [TrainBatches(config, stores)[i] for i in range(40)]
    for start in (0, 1, 17):
        got = take(TrainBatches(config, stores).iterate(start), 12)
        assert all(same(a, b) for a, b in zip(got, reference[start : start + 12], strict=True))
    for processes in (2, 3, 6):
        shares = [take(TrainBatches(config, stores, Share((p,), processes)).iterate(5), 3) for p in range(processes)]
        for step, parts in enumerate(zip(*shares, strict=True)):
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            assert same(joined, reference[5 + step])
    whole = list(HeldoutBatches(config, stores, 6))
    shares = [list(HeldoutBatches(config, stores, 6, share=Share((p,), 3))) for p in range(3)]
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert same({name: np.concatenate([part[name] for part in parts]) for name in batch}, batch)


@pytest.mark.parametrize('prefetch', [0, 3])
def test_a_process_reads_its_own_rows_and_few_batches_ahead(make_config, corpus, monkeypatch, prefetch):
    """However long the consumer takes: what is held is bounded by data.prefetch, and of each batch by the share."""
    config = make_config(corpus[1], batch_size=12, prefetch=prefetch, num_threads=2)
    batches = TrainBatches(config, prepare(config.data, progress=False), Share((1, 4), 6))
    asked: list[int] = []
    fill = Rows.fill
    monkeypatch.setattr(
        Rows, 'fill', lambda self, batch, *rows: (asked.append(len(batch['tokens'])), fill(self, batch, *rows))
    )
    iterator = batches.iterate(5)
    first = next(iterator)
    before, deadline = -1, time.monotonic() + 10
    while before != len(asked) and time.monotonic() < deadline:
        before = len(asked)
        time.sleep(0.3)
    iterator.close()
    assert set(asked) == {4} and len(asked) <= 1 + prefetch + config.data.num_threads * bool(prefetch)
    whole = TrainBatches(config, prepare(config.data, progress=False))[5]
    assert same(first, {name: rows[[2, 3, 8, 9]] for name, rows in whole.items()})


def test_batches_depend_on_the_seed(make_config, corpus):
    batches = []
    for seed in (0, 1):
        config = make_config(corpus[1], seed=seed)
        batches.append(TrainBatches(config, prepare(config.data, progress=False))[0])
    assert not same(*batches)


def test_batches_from_disk_equal_those_from_memory(make_config, corpus):
    config = make_config(corpus[1])
    [prepared] = prepare(config.data, progress=False)
    stores = [TokenStore.open(prepared.path, 'train', memory_limit=limit) for limit in (0, 1 << 20)]
    assert [isinstance(store._tokens, np.ndarray) for store in stores] == [False, True]
    a, b = (TrainBatches(config, [store]) for store in stores)
    assert all(same(a[i], b[i]) for i in range(20))


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=6).filter(any),
    st.integers(0, 10**12),
)
def test_mixture_is_exact_from_any_place(weights, start):
    mixture = Mixture(weights)
    draws = [mixture(start + i) for i in range(300)]
    counts = Counter(source for source, _ in draws)
    for source, weight in enumerate(weights):
        assert abs(counts[source] - 300 * weight / sum(weights)) <= len(weights) + 1
        mine = [before for s, before in draws if s == source]
        assert mine == list(range(mine[0], mine[0] + len(mine))) if mine else True  # no row is left out or repeated
        assert weight > 0 or not mine
    assert [count for _, count in (mixture(i) for i in range(20)) if count > 20] == []
    for source in range(len(weights)):
        assert mixture.counts(start + 300)[source] - mixture.counts(start)[source] == counts[source]


def test_mixture_follows_weights_and_sizes(make_config, tmp_path):
    specs = [f'files:{write_jsonl(tmp_path / f"{n}.jsonl", make_texts(n, seed=n))}' for n in (10, 30)]
    config = make_config(*specs, weights=(3.0, 1.0))
    stores = prepare(config.data, progress=False)
    weighted = TrainBatches(config, stores)
    assert Counter(weighted.mixture(i)[0] for i in range(400)) == {0: 300, 1: 100}
    config.data.weights = ()
    by_size = TrainBatches(config, stores)
    rows = sum(rows.num_rows for rows in by_size.rows)
    assert by_size.epochs(rows) == pytest.approx([4.0, 4.0], abs=0.5)  # batches of 4 rows
    # The rows of a batch come from where the mixture says.
    for step in range(10):
        batch = weighted[step]
        for row in range(4):
            source, index = weighted.mixture(step * 4 + row)
            alone = {name: np.zeros_like(values[:1]) for name, values in batch.items()}
            weighted.rows[source].fill(alone, [0], [index])
            assert same(alone, {name: values[row : row + 1] for name, values in batch.items()})


@pytest.mark.parametrize(
    'options, processes, words',
    [
        ({'weights': (1.0, 2.0)}, 1, 'data.weights: 2 weights for 1 sources'),
        ({'weights': (0.0,)}, 1, 'data.weights'),
        ({'weights': (-1.0,)}, 1, 'data.weights'),
        ({}, 3, 'train.batch_size: 4 rows cannot be divided into 3 equal parts'),
    ],
)
def test_bad_options_are_refused(make_config, corpus, options, processes, words):
    config = make_config(corpus[1], **options)
    stores = prepare(config.data, progress=False)
    with pytest.raises(UserError, match=words):
        TrainBatches(config, stores, Share((0,), processes))


def test_stores_of_different_tokenizers_do_not_mix(make_config, corpus):
    stores = []
    for size in (300, 310):
        config = make_config(corpus[1], tokenizer_vocab_size=size)
        stores += prepare(config.data, progress=False)
    with pytest.raises(UserError, match='another tokenizer'):
        TrainBatches(config, stores)


def test_heldout_from_texts(make_config, corpus):
    config = make_config(corpus[1])
    tokenizer = prepare(config.data, progress=False)[0].load_tokenizer()
    texts = ['Straße 12', '', '漢字\n' * 50]
    held = heldout_from_texts(texts, tokenizer, config, 3)
    targets = np.concatenate([batch['targets'][batch['loss_mask']] for batch in held]).tolist()
    assert targets == [*tokenizer.encode(texts[0]), tokenizer.eot_id, *tokenizer.encode(texts[2]), tokenizer.eot_id]
    assert held.num_bytes == len(''.join(texts).encode()) and held.num_tokens == len(targets)
    documents = [Document(text, 'x') for text in texts]
    assert all(same(a, b) for a, b in zip(held, heldout_from_texts(documents, tokenizer, config, 3), strict=True))
    with pytest.raises(UserError, match='no text'):
        heldout_from_texts(['', ''], tokenizer, config, 3)
