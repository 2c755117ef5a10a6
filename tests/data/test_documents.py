"""The split: by the text alone, a document on either side whatever the corpus, nothing lost."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcon_jax.data.documents import Document, Split, cut, text_hash
from mixcon_jax.errors import UserError
from tests.data.cases import make_texts


def placed(texts: list[str], fraction: float) -> list[tuple[str, bool]]:
    documents = [Document(text, 'x') for text in texts]
    return [(place.text, place.heldout) for place in Split(documents, fraction).place(documents)]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(['', *make_texts(8)]), min_size=1, max_size=12).filter(any),
    st.sampled_from([1e-9, 0.05, 0.5, 0.999]),
)
def test_both_sides_have_a_document_and_nothing_is_lost(texts, fraction):
    got = placed(texts, fraction)
    assert {heldout for _, heldout in got} == {False, True}
    assert ''.join(text for text, _ in got) == ''.join(texts)
    by_hash = {text: text_hash(text.encode()) / 2**64 < fraction for text in texts if text}
    if len(set(by_hash.values())) == 2:
        assert dict(got) == by_hash and len(got) == sum(map(bool, texts))
    else:  # every document is cut
        assert [heldout for _, heldout in got] == [False, True] * (len(got) // 2)
        assert [a + b for (a, _), (b, _) in itertools.batched(got, 2)] == [text for text in texts if text]


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
    assert placed(['x', 'ab', 'x'], 1e-9) == [('x', False), ('a', False), ('b', True), ('x', False)]
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
    assert not split.cuts
    sides = {place.text: place.heldout for place in split.place(Document(text, 'y') for text in texts)}
    assert {place.text: place.heldout for place in split.place(few)} == {text: sides[text] for text in texts[:3]}
    assert sides == {place.text: place.heldout for place in Split(None, 0.2).place(Document(t, '') for t in texts)}
    assert Split(few[:1], 0.2).cuts
