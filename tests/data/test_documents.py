"""The split: by the text alone, a document on either side whatever the corpus, nothing lost."""

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
    if len(set(filter(None, texts))) == 1:
        assert ''.join(text for text, _ in got) == next(filter(None, texts))
    else:
        assert [text for text, _ in got] == [text for text in texts if text]
        sides = dict(got)
        assert all(sides[text] == heldout for text, heldout in got)  # copies fall on the same side


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
    with pytest.raises(UserError, match='one document of 1 character cannot be split'):
        placed(['a', 'a'], 0.5)
    for texts in ([], ['', '']):
        with pytest.raises(UserError, match=f"'corpus' is empty: {len(texts)} documents, none of them with text"):
            placed(texts, 0.5)
