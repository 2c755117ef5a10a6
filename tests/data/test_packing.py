"""The plan of rows against a loop that lays documents out token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcon_jax.data.packing import Permutation, Rows, empty_batch, make_plan, mix, mix_array
from mixcon_jax.data.store import TokenStore

EOT = 7


def sequential_rows(documents: list[list[int]], order: list[int], seq_len: int, packing: bool) -> list[list[tuple]]:
    """Rows of (input, target, segment, position), one token after the other."""
    rows, row = [], []
    for document in order:
        inputs = [EOT, *documents[document]]
        targets = [*documents[document], EOT]
        if row and not packing:
            rows.append(row)
            row = []
        segment, position = (row[-1][2] + 1 if row else 1), 0
        for pair in zip(inputs, targets, strict=True):
            if len(row) == seq_len:
                rows.append(row)
                row, segment, position = [], 1, 0
            row.append((*pair, segment, position))
            position += 1
    return [*rows, row] if row else rows


def store_of(documents: list[list[int]]) -> TokenStore:
    return TokenStore.from_documents([np.array(d, np.uint32) for d in documents], 1, EOT)


DOCUMENTS = st.lists(st.lists(st.integers(8, 99), max_size=40), min_size=1, max_size=12)


@settings(deadline=None)
@given(DOCUMENTS, st.integers(1, 17), st.booleans(), st.one_of(st.none(), st.integers(0, 2**63)), st.integers(0, 3))
def test_rows_equal_a_sequential_loop(documents, seq_len, packing, seed, epoch):
    rows = Rows(store_of(documents), seq_len, seed, packing)
    expected = sequential_rows(documents, rows.plan(epoch).order.tolist(), seq_len, packing)
    assert rows.num_rows == len(rows) == len(expected)
    batch = empty_batch(len(expected), seq_len)
    indices = [epoch * rows.num_rows + row for row in range(rows.num_rows)]
    rows.fill(batch, list(range(len(expected))), indices)
    assert all(batch[name].dtype == np.int32 for name in batch if name != 'loss_mask')
    got = []
    for row in range(len(expected)):
        size = int(batch['loss_mask'][row].sum())
        assert not any(batch[name][row, size:].any() for name in batch)  # what follows is padding
        names = ('tokens', 'targets', 'segment_ids', 'positions')
        got.append(list(zip(*(batch[name][row, :size].tolist() for name in names), strict=True)))
    if seed is None:
        assert got == expected
    else:  # rows are drawn in another order
        assert sorted(got) == sorted(expected)


@given(st.integers(1, 700), st.integers(0, 2**64 - 1), st.integers(0, 9))
@settings(deadline=None)
def test_permutation_is_a_bijection(size, seed, epoch):
    permutation = Permutation(size, seed, epoch)
    entries = [permutation[i] for i in range(size)]
    assert sorted(entries) == list(range(size))
    assert permutation.array().tolist() == entries


def test_permutation_of_billions_is_random_access():
    permutation = Permutation(10**12, 3)
    entries = [permutation[i] for i in range(2000)]
    assert len(set(entries)) == 2000
    assert 0.48 < np.mean(entries) / 10**12 < 0.52


def test_permutations_differ_by_key_and_look_uniform():
    size, trials = 5, 2000
    counts = np.zeros((size, size))
    for seed in range(trials):
        for place, entry in enumerate(Permutation(size, seed).array()):
            counts[place, entry] += 1
    expected = trials / size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 45  # 16 degrees of freedom: exceeded once in about 7000 such tests
    assert Permutation(1000, 0, 1).array().tolist() != Permutation(1000, 1, 0).array().tolist()


def test_mix_is_splitmix64():
    """The first outputs of splitmix64 from state 1234567, as its reference code prints them."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + i * golden) % 2**64 for i in range(1, 4)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix(state) for state in states] == expected
    assert mix_array(np.array(states, np.uint64)).tolist() == expected


@pytest.mark.parametrize('packing', [True, False])
def test_epochs_differ_and_have_equally_many_rows(packing):
    documents = [[10 + i] * (i % 7) for i in range(30)]
    rows = Rows(store_of(documents), 8, 5, packing)
    plans = [rows.plan(epoch) for epoch in (0, 1, 5)]
    assert len({tuple(plan.order.tolist()) for plan in plans}) == 3
    assert {plan.num_rows for plan in plans} == {rows.num_rows}
    assert rows.plan(0).order.tolist() == plans[0].order.tolist()  # made again after it was dropped


def test_plan_memory_is_one_entry_a_document():
    plan = make_plan(np.array([10**12, 3, 10**13]), 4096, True, (0, 0))
    assert plan.order.size == plan.ends.size == 3
    documents, begin, end = plan.spans(plan.num_rows // 2)
    assert documents.size == 1 and (end - begin).tolist() == [4096]
