"""The split: by the text alone, a document on either side whatever the corpus, nothing lost."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcon_jax.data.documents import TAIL, Document, Split, cut, text_hash
from mixcon_jax.errors import UserError
from tests.data.cases import make_texts

LONG = ['x' * 700 + '\n' + 'y' * 100, 'z' * 900]


def hash_of(text: str) -> int:
    return text_hash(text.encode())


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, 'x') for text in texts]


def placed(texts: list[str], fraction: float) -> list[tuple[str, bool]]:
    return [(place.text, place.heldout) for place in Split(documents(texts), fraction).place(documents(texts))]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(['', *make_texts(8), *LONG]), min_size=1, max_size=12).filter(any),
    st.sampled_from([1e-9, 0.05, 0.5, 0.999]),
)
def test_both_sides_have_a_document_and_nothing_is_lost(texts, fraction):
    got = placed(texts, fraction)
    assert {heldout for _, heldout in got} == {False, True}
    assert ''.join(text for text, _ in got) == ''.join(texts)
    texts = [text for text in texts if text]
    by_hash = {text: hash_of(text) / 2**64 < fraction for text in texts}
    kind = Split(documents(texts), fraction).kind
    if len(set(by_hash.values())) == 2:
        assert kind == 'hash' and dict(got) == by_hash and len(got) == len(texts)
    elif kind == 'rank':  # whole documents, those with the smallest hashes
        assert [text for text, _ in got] == texts
        assert max(hash_of(text) for text, heldout in got if heldout) < min(hash_of(t) for t, held in got if not held)
    elif len(by_hash) > 1:  # those that are long enough are cut, and they are most of the text
        whole = [text for text, _ in got if text in by_hash]
        parts = [text for text, _ in got if text not in by_hash]
        assert Counter(whole + [a + b for a, b in itertools.batched(parts, 2)]) == Counter(texts)
        assert min(map(len, parts)) >= TAIL / 2 and sum(map(len, whole)) < sum(map(len, parts)) * 4


@pytest.mark.parametrize('fraction', [0.05, 0.3, 0.9])
def test_many_short_documents_are_held_out_whole(fraction):
    """Where the hash leaves a side empty; cut, each would give a character or two."""
    texts = [text for text in make_texts(400, longest=12) if (hash_of(text) / 2**64 < fraction) == (fraction > 0.5)]
    texts = texts[:60]
    got = placed(texts, fraction)
    assert [text for text, _ in got] == texts
    held, whole = [sum(len(text.encode()) * (heldout or all_) for text, heldout in got) for all_ in (False, True)]
    assert fraction <= held / whole < fraction + 0.05
    # A long one beside them is cut, and they are not.
    side = fraction > 0.5
    long = next(text for i in range(99) if (hash_of(text := f'{i}' + LONG[0] * 50) / 2**64 < fraction) == side)
    got = placed([*texts, long], fraction)
    assert [text for text, _ in got[:-2]] == texts and [heldout for _, heldout in got] == [False] * 61 + [True]


def test_the_split_is_the_hash_and_does_not_depend_on_the_rest():
    texts = make_texts(2000)
    sides = dict(placed(texts, 0.1))
    assert 150 < sum(sides.values()) < 250
    assert all(heldout == (text_hash(text.encode()) / 2**64 < 0.1) for text, heldout in sides.items())
    some = dict(placed(texts[500:900][::-1], 0.1))
    assert all(sides[text] == heldout for text, heldout in some.items())


def test_only_as_many_documents_as_needed_are_read():
    def endless():
        yield from (Document(text, 'x') for text in make_texts(200))
        raise AssertionError('read too far')

    Split(endless(), 0.1)


@pytest.mark.parametrize('fraction', [0.01, 0.05, 0.3, 0.9])
def test_one_document_is_cut_at_a_line(fraction):
    text = ''.join(f'line {i}\n' for i in range(300))
    begin, end = cut(Document(text, 'book.txt'), fraction)
    assert begin.text + end.text == text and begin.text.endswith('\n')
    assert len(end.text) / len(text) == pytest.approx(fraction, rel=0.5)
    assert (begin.name, end.name) == ('book.txt', 'book.txt (held-out end)')
    flat = cut(Document('x' * 1000, 'flat'), fraction)
    assert len(flat[1].text) == 1000 * fraction


def test_tiny_and_empty_corpora():
    assert placed(['ab'], 0.01) == [('a', False), ('b', True)]
    assert placed(['ab', 'ab'], 1e-9) == [('a', False), ('b', True)] * 2
    first = hash_of('x') < hash_of('ab')
    assert placed(['x', 'ab', 'x'], 1e-9) == [('x', first), ('ab', not first), ('x', first)]
    with pytest.raises(UserError, match='one document of 1 character cannot be split'):
        placed(['a', 'a'], 0.5)
    for texts in ([], ['', '']):
        with pytest.raises(UserError, match=f"'corpus' is empty: {len(texts)} documents, none of them with text"):
            placed(texts, 0.5)


def test_a_split_of_a_mixture_does_not_depend_on_the_source():
    """A source too small to have both sides follows the hash as the others do, as long as the mixture has both."""
    texts = make_texts(60)
    few = [Document(text, 'x') for text in texts[:3]]
    split = Split([*few, *(Document(text, 'y') for text in texts)], 0.2)
    assert split.kind == 'hash'
    sides = {place.text: place.heldout for place in split.place(Document(text, 'y') for text in texts)}
    assert {place.text: place.heldout for place in split.place(few)} == {text: sides[text] for text in texts[:3]}
    assert sides == {place.text: place.heldout for place in Split(None, 0.2).place(Document(t, '') for t in texts)}
    assert Split(few[:1], 0.2).kind == 'cut'
    # What is known of other text counts as if it were read.
    side = sides[texts[0]]
    assert Split(few[:1], 0.2, sides=[not side]).kind == 'hash' and Split(few[:1], 0.2, sides=[side]).kind == 'cut'
