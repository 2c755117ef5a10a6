"""Several sources, small ones and strange ones: one split for all, and a word where scores would mislead."""

import json
import shutil

import numpy as np
import pytest

from mixcon_jax.data import HeldoutBatches, TokenStore, TrainBatches, prepare
from mixcon_jax.data.documents import text_hash
from mixcon_jax.data.remarks import percent
from mixcon_jax.data.statistics import Statistics
from mixcon_jax.errors import UserError
from tests.data.cases import lossy_tokenizer, make_texts, write_jsonl


def sides(stores) -> dict[str, set[str]]:
    """The texts of each split, of all stores together."""
    found: dict[str, set[str]] = {'train': set(), 'heldout': set()}
    for prepared in stores:
        tokenizer = prepared.load_tokenizer()
        for split, texts in found.items():
            store = prepared.open(split)
            texts |= {tokenizer.decode(ids) for ids in store.read_many(store.starts, store.starts + store.lengths)}
    return found


@pytest.fixture
def overlapping(tmp_path) -> list[str]:
    """A source, and three that are parts of it, each too small to have both sides: train, train, held out."""
    texts = make_texts(40)
    by_side = sorted(texts, key=hash_of)
    specs = [f'files:{write_jsonl(tmp_path / "all.jsonl", texts)}']
    for number, text in enumerate((by_side[-1], by_side[-2], by_side[0])):
        specs.append(f'files:{write_jsonl(tmp_path / f"{number}.jsonl", [text])}')
    return specs


def test_what_one_source_holds_out_no_other_trains_on(make_config, overlapping):
    config, lines = make_config(*overlapping), []
    stores = prepare(config.data, progress=lines.append)
    together = sides(stores)
    assert together['train'] and together['heldout'] and not together['train'] & together['heldout']
    assert not any('too few documents' in line for line in lines)
    assert all(store.metadata['split'] == 'hash' for store in stores)
    # In other mixtures every text is on the same side, wherever the mixture as a whole has both.
    alone = sides(prepare(make_config(overlapping[0]).data, progress=False))
    assert alone == together
    # A source with an empty side takes part in the batches of the other.
    TrainBatches(config, stores)[0]
    assert HeldoutBatches(config, stores, 2).num_tokens == sum(store.open('heldout').num_targets for store in stores)
    empty = [not store.open('train').num_targets for store in stores]
    assert any(empty)
    config.data.weights = (1.0,) * 4
    with pytest.raises(UserError, match='all of whose documents are held out'):
        TrainBatches(config, stores)


def test_a_mixture_too_small_for_the_hash_says_so(make_config, overlapping):
    lines = []
    stores = prepare(make_config(*overlapping[1:3]).data, progress=lines.append)
    found = sides(stores)
    assert found['train'] and found['heldout'] and not found['train'] & found['heldout']
    assert any('too few documents for the hash' in line for line in lines)
    assert {store.metadata['split'] for store in stores} == {'rank'}
    # These stores are not taken for those of a mixture that the hash splits, nor the other way round.
    more = sides(prepare(make_config(*overlapping).data, progress=False))
    assert not more['train'] & more['heldout']
    assert prepare(make_config(*overlapping[1:3]).data, progress=False) == stores


def hash_of(text: str) -> int:
    return text_hash(text.encode())


@pytest.mark.parametrize(
    'share, words',
    [
        (0, '0 %'),
        (0.57, '57 %'),
        (0.29, '29 %'),
        (0.12345, '12.35 %'),
        (0.999999, '99.99 %'),
        (1, '100 %'),
        (1 - 2**-53, '99.99 %'),
    ],
)
def test_shares_are_rounded_and_only_the_whole_is_a_hundred(share, words):
    assert percent(share) == words


def test_a_share_of_documents_that_is_no_share_of_text_is_said(make_config, tmp_path):
    notes = [f'note {i}' for i in range(60)]
    books = [f'{i} ' + 'word ' * 40_000 for i in range(200)]
    book, other = min(books, key=hash_of), max(books, key=hash_of)
    write_jsonl(tmp_path / 'shelf.jsonl', [book, *notes])
    config, said = make_config(f'files:{tmp_path}/shelf.jsonl', heldout_fraction=0.05), []
    for _ in range(2):  # also when it is found
        said.clear()
        prepare(config.data, progress=said.append)
        assert [line for line in said if 'bytes are held out, 99.' in line and 'data.heldout_fraction is 5 %' in line]
    # Few documents are cut, so a book beside a note loses its end alone.
    (tmp_path / 'book.txt').write_text(other)
    (tmp_path / 'note.txt').write_text('a note\n')
    [store] = prepare(make_config(f'files:{tmp_path}/*.txt', heldout_fraction=0.05).data, progress=False)
    counts = store.metadata['counts']
    assert counts['heldout']['bytes'] == pytest.approx(0.05 * len(book), rel=0.01)
    write_jsonl(tmp_path / 'even.jsonl', ['word ' * 50 + str(i) for i in range(60)])
    said.clear()
    prepare(make_config(f'files:{tmp_path}/even.jsonl').data, progress=said.append)
    assert not any('bytes are held out' in line for line in said)
    # A store is compared with the fraction that it was prepared with.
    [half] = prepare(make_config(f'files:{tmp_path}/even.jsonl', heldout_fraction=0.5).data, progress=False)
    prepare(make_config(f'store:{half.path}', heldout_fraction=0.05).data, progress=said.append)
    assert not any('bytes are held out' in line for line in said)


def test_lost_text_is_measured_and_said(make_config, corpus, tmp_path):
    config, said = make_config(corpus[1]), []
    [kept] = prepare(config.data, progress=said.append)
    assert kept.metadata['round_trip'] == {'train': 1.0, 'heldout': 1.0}
    assert HeldoutBatches(config, [kept], 2).round_trip == 1 and not any('loses' in line for line in said)
    config.data.tokenizer = lossy_tokenizer(tmp_path / 'lossy.json')
    [lost] = prepare(config.data, progress=said.append)
    shares = lost.metadata['round_trip']
    assert 0 < shares['heldout'] < 1 and 0 < shares['train'] < 1
    assert any('the tokenizer loses text' in line for line in said)
    assert HeldoutBatches(config, [lost], 2).round_trip == pytest.approx(shares['heldout'])
    assert TokenStore.open(lost.path, 'heldout').round_trip == shares['heldout']
    # A store of format 1 never measured: what cannot lose text needs no measuring.
    for store, share in ((kept, 1.0), (lost, None)):
        old = tmp_path / f'old-{share}'
        shutil.copytree(store.path, old)
        record = json.loads((old / 'metadata.json').read_text())
        for key in ('round_trip', 'files', 'split', 'skipped', 'checksum'):
            del record[key]
        (old / 'metadata.json').write_text(json.dumps(record | {'version': 1}))
        config.data.sources, config.data.tokenizer = (f'store:{old}',), 'bpe'
        said.clear()
        [again] = prepare(config.data, progress=said.append)
        assert HeldoutBatches(config, [again], 2).round_trip == share
        assert any('never measured' in line for line in said) == (share is None)


def test_stores_with_a_split_of_their_own_are_remarked_on(make_config, overlapping):
    said = []
    [small] = prepare(make_config(overlapping[1]).data, progress=False)
    prepare(make_config(f'store:{small.path}', overlapping[0]).data, progress=said.append)
    assert any('its split is its own' in line for line in said)
    [large] = prepare(make_config(overlapping[0]).data, progress=False)
    said.clear()
    prepare(make_config(f'store:{large.path}', overlapping[0]).data, progress=said.append)
    assert not any('its split is its own' in line for line in said)


def test_records_that_cannot_be_used_are_counted(make_config, tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(30))
    path.write_text(path.read_text() + '{"text": "cut\n')
    with pytest.raises(UserError, match=r'a.jsonl:31: not valid JSON'):
        prepare(make_config(f'files:{path}').data, progress=False)
    said = []
    [store] = prepare(make_config(f'files:{path}', bad_records='skip').data, progress=said.append)
    assert any('1 records are left out; the first: ' in line and 'a.jsonl:31' in line for line in said)
    counts = store.metadata['counts'].values()
    assert store.metadata['skipped'] == 1 and sum(count['documents'] for count in counts) == 30


def test_empty_sources_beside_others_are_refused(make_config, corpus, tmp_path):
    (tmp_path / 'empty.txt').write_text('')
    with pytest.raises(UserError, match=r"empty.txt' is empty"):
        prepare(make_config(corpus[1], f'files:{tmp_path}/empty.txt').data, progress=False)


def test_batches_of_one_source_are_those_of_before_beside_an_empty_one(make_config):
    documents = [np.arange(1, 9, dtype=np.uint16)] * 5
    full, empty = TokenStore.from_documents(documents, 1, 0), TokenStore.from_documents([], 0, 0)
    one, two = TrainBatches(make_config('a'), [full]), TrainBatches(make_config('a', 'b'), [full, empty])
    assert all(np.array_equal(one[i]['tokens'], two[i]['tokens']) for i in range(5))
    assert two.epochs(3)[1] == 0
    with pytest.raises(UserError, match='no train documents'):
        TrainBatches(make_config('b'), [empty])


def test_a_source_that_is_named_twice_is_prepared_once_and_said(make_config, corpus, tmp_path):
    lines = []
    first, second = prepare(make_config(corpus[1], corpus[1]).data, progress=lines.append)
    assert first == second and sum('documents/s' in line for line in lines) == 1
    assert any('is named twice: its text counts twice' in line for line in lines)
    assert not any('already prepared' in line for line in lines)
    # Files that sources have in common likewise, whatever their names there.
    write_jsonl(tmp_path / 'more.jsonl', make_texts(9, seed=1))
    (tmp_path / 'link.jsonl').symlink_to('corpus.jsonl')
    for other, count in (('*.jsonl', 1), ('link.jsonl', 1), ('more.jsonl', 0)):
        lines.clear()
        prepare(make_config(corpus[1], f'files:{tmp_path}/{other}').data, progress=lines.append)
        assert sum(f'have {count} files in common: they count in both' in line for line in lines) == count


def test_data_with_an_empty_side_is_refused(make_config, overlapping):
    """Of a store that was prepared in a mixture: by itself it has nothing to score, or nothing to learn from."""
    stores = prepare(make_config(*overlapping).data, progress=False)
    for store, words in ((stores[1], 'no document is held out'), (stores[3], 'all documents are held out')):
        with pytest.raises(UserError, match=rf'store:{store.path}: {words}, so there is no \w+ text; name other'):
            prepare(make_config(f'store:{store.path}').data, progress=False)
    assert prepare(make_config(f'store:{stores[1].path}', f'store:{stores[3].path}').data, progress=False)
    with pytest.raises(UserError, match='no document is held out'):
        prepare(make_config(f'store:{stores[1].path}', overlapping[2]).data, progress=False)


@pytest.mark.parametrize('tokenizer', ['bpe', 'given'])
def test_where_every_record_is_left_out_the_first_says_why(make_config, corpus, tmp_path, tokenizer):
    write_jsonl(tmp_path / 'body.jsonl', make_texts(30), field='body')
    options = {'bad_records': 'skip'}
    if tokenizer == 'given':
        options['tokenizer'] = prepare(make_config(corpus[1]).data, progress=False)[0].tokenizer
    spec = f'files:{tmp_path}/body.jsonl'
    for sources in ([spec], [corpus[1], spec]):
        with pytest.raises(UserError, match=r"is empty: .*30 records are left out; the first: .*:1: no field 'text'"):
            prepare(make_config(*sources, **options).data, progress=False)


def test_what_a_store_remembers_of_its_text_is_from_before_it_was_read(make_config, corpus, tmp_path, monkeypatch):
    config, changed = make_config(corpus[1]), []

    def change(statistics, batch):
        if not changed:
            write_jsonl(tmp_path / 'corpus.jsonl', make_texts(50))
            changed.append(add(statistics, batch))
        else:
            add(statistics, batch)

    add = Statistics.add
    with monkeypatch.context() as patch:
        patch.setattr(Statistics, 'add', change)
        [store] = prepare(config.data, progress=False)
    [after] = prepare(config.data, progress=False)
    assert changed and after.path != store.path
    assert after.metadata['source']['fingerprint'] != store.metadata['source']['fingerprint']
