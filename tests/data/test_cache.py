"""The cache when something is missing: half-gone stores, text that is gone, no locks; and stores of format 1."""

import errno
import fcntl
import json
import os
import shutil
import stat
import sys
import time
import types
from pathlib import Path

import pytest

from mixcon_jax.data import disk, open_dataset, prepare
from mixcon_jax.data import store as store_lib
from mixcon_jax.data.store_writer import StoreWriter
from mixcon_jax.errors import UserError
from tests.data.cases import lossy_tokenizer, make_texts, write_jsonl


def contents(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != '.locks')


def parts(store) -> list[str]:
    return ['metadata.json', 'tokenizer.json', *store.metadata['files']]


def test_a_store_that_lost_a_part_is_prepared_again(make_config, corpus, tmp_path):
    config = make_config(corpus[1])
    [store] = prepare(config.data, progress=False)
    before = store.metadata
    for name in dict.fromkeys(parts(store)):
        Path(store.path, name).unlink()
        said = []
        [again] = prepare(config.data, progress=said.append)
        assert again == store and store.metadata == before
        assert any('preparing it again' in line for line in said)
    assert len(contents(tmp_path / 'cache')) == 2  # and nothing is left over
    # Of the tokenizer likewise.
    [tokenizer] = (tmp_path / 'cache').glob('tokenizer-*.json')
    tokenizer.write_text(tokenizer.read_text()[:99])
    said = []
    assert prepare(config.data, progress=said.append) == [store]
    assert any('training it again' in line for line in said) and prepare(config.data, progress=False) == [store]


def test_text_that_is_gone_is_not_needed_where_its_tokens_are(make_config, corpus, tmp_path):
    config = make_config(corpus[1])
    [store] = prepare(config.data, progress=False)
    (tmp_path / 'corpus.jsonl').rename(tmp_path / 'moved.jsonl')
    said = []
    assert prepare(config.data, progress=said.append) == [store]
    assert 'the files are gone; going on with the tokens' in said[0]
    # Not where anything would have to be made of the text, and the message names the reason and the remedy.
    for options, words in (
        ({'tokenizer_vocab_size': 310}, rf'a tokenizer .* has to learn .* or take data.tokenizer={store.path}'),
        ({'heldout_fraction': 0.3}, r'they are of data.heldout_fraction 0.2, not 0.3; restore the text'),
        ({'tokenizer': lossy_tokenizer(tmp_path / 'other.json')}, 'they are of another data.tokenizer; restore'),
    ):
        with pytest.raises(UserError, match=f'no file matches .*{words}'):
            prepare(make_config(corpus[1], **options).data, progress=False)
    with pytest.raises(UserError, match='no file matches'):
        prepare(make_config(corpus[1], text_field='body').data, progress=False)
    with pytest.raises(UserError, match='no file matches'):
        prepare(make_config(f'files:{tmp_path}/other.jsonl').data, progress=False)
    lost = Path(store.path) / 'tokens' / 'c' / '0'
    lost.unlink()
    with pytest.raises(UserError, match=r'no file matches .*; and of its tokens: .* tokens/c/0 is missing; restore it'):
        prepare(config.data, progress=False)
    assert Path(store.path).exists()


def test_the_tokenizer_of_text_that_is_gone_is_its_stores(make_config, corpus, tmp_path, monkeypatch):
    """Where the one that was trained is lost, or would be another one's with the library of today."""
    config = make_config(corpus[1])
    [store] = prepare(config.data, progress=False)
    (tmp_path / 'corpus.jsonl').unlink()
    with monkeypatch.context() as patch:
        patch.setattr('tokenizers.__version__', '99')
        assert prepare(config.data, progress=False) == [store]
    [tokenizer] = (tmp_path / 'cache').glob('tokenizer-*.json')
    tokenizer.unlink()
    assert prepare(config.data, progress=False) == [store]


@pytest.mark.parametrize('gone', [0, 1])
def test_one_source_that_is_gone_stops_no_other(make_config, corpus, tmp_path, gone):
    """Wherever it stands among them: whether the other has to be split by the hash, its own store tells."""
    paths = [write_jsonl(tmp_path / f'{i}.jsonl', make_texts(30, seed=i)) for i in range(2)]
    config = make_config(*(f'files:{path}' for path in paths))
    stores = prepare(config.data, progress=False)
    paths[gone].unlink()
    shutil.rmtree(stores[1 - gone].path)
    assert prepare(config.data, progress=False) == stores
    # Its side counts: the other has a single document, which need not be cut.
    [alone] = prepare(make_config(corpus[1]).data, progress=False)
    (tmp_path / 'corpus.jsonl').unlink()
    single = f'files:{write_jsonl(tmp_path / "single.jsonl", make_texts(1, seed=5))}'
    pair = [corpus[1], single] if gone else [single, corpus[1]]
    made = prepare(make_config(*pair, tokenizer=alone.tokenizer).data, progress=False)
    assert [store.metadata['split'] for store in made] == ['hash'] * 2


def test_relative_names_are_compared_from_the_root(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / 'a.jsonl', make_texts(20))
    config = make_config('files:a.jsonl')
    stores = prepare(config.data, progress=False)
    (tmp_path / 'a.jsonl').unlink()
    assert prepare(config.data, progress=False) == stores
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='no file matches'):
        prepare(config.data, progress=False)


def test_a_run_finds_its_data_by_the_hash(make_config, corpus, tmp_path, capsys):
    config = make_config(corpus[1], f'files:{write_jsonl(tmp_path / "b.jsonl", make_texts(20, seed=1))}')
    dataset = open_dataset(config)
    capsys.readouterr()
    assert open_dataset(config, dataset.identity).stores == dataset.stores and not capsys.readouterr().err
    write_jsonl(tmp_path / 'corpus.jsonl', make_texts(30, seed=2))  # changed
    (tmp_path / 'b.jsonl').unlink()  # and gone
    assert open_dataset(config, dataset.identity).stores == dataset.stores
    first, second = capsys.readouterr().err.splitlines()
    assert 'corpus.jsonl: changed since' in first and f'going on with its tokens, in {dataset.stores[0].path}' in first
    assert 'b.jsonl: the files are gone; going on with its tokens' in second
    # So it does where a store that it named was moved, if the cache has it.
    named = dataset.stores[0].path
    shutil.copytree(named, tmp_path / 'store')
    by_name = make_config(f'store:{tmp_path}/store')
    assert open_dataset(by_name, dataset.identity[:1]).stores[0].path == f'{tmp_path}/store'
    shutil.rmtree(tmp_path / 'store')
    assert open_dataset(by_name, dataset.identity[:1]).stores[0].path == named
    assert f'store:{tmp_path}/store: no such store is there any more' in capsys.readouterr().err
    other = make_config(corpus[1])
    assert open_dataset(other, dataset.identity).identity != dataset.identity
    # A damaged store is not the data, whatever its metadata say.
    shutil.rmtree(Path(dataset.stores[1].path) / 'tokens')
    with pytest.raises(UserError, match='no file matches'):
        open_dataset(config, dataset.identity)


@pytest.mark.parametrize('code', [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_locks(make_config, corpus, tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    [expected] = prepare(make_config(corpus[1], cache_dir=str(tmp_path / 'locks')).data, progress=False)
    monkeypatch.setattr(fcntl, 'flock', flock)
    config = make_config(corpus[1])
    working = tmp_path / 'cache' / f'{Path(expected.path).name}.tmp-1-x'  # another process may be at work there
    working.mkdir(parents=True)
    said = []
    [store] = prepare(config.data, progress=said.append)
    assert store.fingerprint == expected.fingerprint and working.is_dir()
    assert any('no locks in' in line for line in said)


def test_a_data_set_of_the_hub_is_not_needed_where_its_tokens_are(make_config, monkeypatch):
    records = [{'text': text} for text in make_texts(40)]
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=lambda *_, **__: records))
    config = make_config('huggingface:org/name')
    [store] = prepare(config.data, progress=False)
    for library, words in (
        (types.SimpleNamespace(), "'huggingface:org/name' could not be opened"),
        (None, 'needs the'),
    ):
        monkeypatch.setitem(sys.modules, 'datasets', library)
        said = []
        assert prepare(config.data, progress=said.append) == [store]
        assert words in said[0] and 'going on with the tokens that were prepared before' in said[0]
        with pytest.raises(UserError, match=r'could not be opened|needs the package'):
            prepare(make_config('huggingface:org/other').data, progress=False)


@pytest.mark.parametrize('age, stays', [(3600, True), (2 * disk.FORGOTTEN, False)])
def test_what_another_host_left_goes_when_nobody_has_written_there_for_long(make_config, corpus, tmp_path, age, stays):
    """Its lock may not reach this host. What this one left of the same store goes at once."""
    [expected] = prepare(make_config(corpus[1], cache_dir=str(tmp_path / 'elsewhere')).data, progress=False)
    (tmp_path / 'cache').mkdir()
    place = tmp_path / 'cache' / Path(expected.path).name
    own, other = disk.scratch(place), place.with_name(f'{place.name}.tmp-otherhost.1-0123abcd')
    for folder in (own, other, place.with_name('unrelated.tmp-old')):
        folder.mkdir()
        (folder / 'tokens').write_text('')
        for path in (folder / 'tokens', folder):
            os.utime(path, (time.time() - age,) * 2)
    prepare(make_config(corpus[1]).data, progress=False)
    left = [name for name in contents(tmp_path / 'cache') if '.tmp' in name]
    assert left == [other.name] * stays + ['unrelated.tmp-old']  # which is nobody's of ours


def test_a_cache_for_all_has_locks_for_all(make_config, corpus, tmp_path):
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache').chmod(0o1777)
    prepare(make_config(corpus[1]).data, progress=False)
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    assert mode(tmp_path / 'cache' / '.locks') == 0o1777
    assert {mode(path) for path in (tmp_path / 'cache' / '.locks').iterdir()} == {0o666}


def test_another_users_folder_in_the_cache_is_no_concern(make_config, corpus, tmp_path, monkeypatch):
    config = make_config(corpus[1])
    [store] = prepare(config.data, progress=False)
    shutil.copytree(store.path, tmp_path / 'cache' / 'private')
    read = store_lib.read_file

    def refused(path, name):
        if path.endswith('private'):
            raise UserError(f'{path}: cannot be read (Permission denied)')
        return read(path, name)

    monkeypatch.setattr(store_lib, 'read_file', refused)
    assert open_dataset(config, (store.fingerprint,)).stores == (store,)
    with pytest.raises(UserError, match='no file matches'):
        prepare(make_config('files:nowhere/*.txt').data, progress=False)


@pytest.mark.parametrize('part', ['tokens/', 'tokenizer.json'])
@pytest.mark.parametrize('code', [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_store_that_the_system_does_not_let_one_see_is_not_prepared_again(
    make_config, corpus, tmp_path, monkeypatch, code, part
):
    config = make_config(corpus[1])
    [store] = prepare(config.data, progress=False)
    look = os.stat

    def refused(path, *args, **kwargs):
        if str(path).startswith(f'{store.path}/{part}'):
            raise OSError(code, os.strerror(code), str(path))
        return look(path, *args, **kwargs)

    monkeypatch.setattr(store_lib.os, 'stat', refused)
    words = rf'cannot be read now \({os.strerror(code)}\); the store may be whole'
    with pytest.raises(UserError, match=words):
        prepare(config.data, progress=False)
    with pytest.raises(UserError, match=words):  # a run that goes on with it does not look at the text then
        open_dataset(config, (store.fingerprint,))
    copy = tmp_path / 'copy'  # but takes what is there as well
    monkeypatch.undo()
    shutil.copytree(store.path, copy)
    monkeypatch.setattr(store_lib.os, 'stat', refused)
    assert open_dataset(make_config(f'store:{copy}'), (store.fingerprint,)).stores[0].path == str(copy)
    monkeypatch.undo()
    assert prepare(config.data, progress=False) == [store]


def test_without_locks_the_faster_process_wins(make_config, corpus, monkeypatch):
    config = make_config(corpus[1])
    [store] = prepare(config.data, progress=False)
    shutil.move(store.path, store.path + '.faster')
    finish = StoreWriter.finish

    def slow(writer, metadata):
        finish(writer, metadata)
        shutil.move(store.path + '.faster', store.path)

    monkeypatch.setattr(StoreWriter, 'finish', slow)
    assert prepare(config.data, progress=False) == [store]
    assert not [name for name in contents(Path(store.path).parent) if '.tmp' in name]


def test_a_damaged_store_goes_aside_whole(make_config, corpus, monkeypatch):
    """Without locks another process may put a whole one in its place at any moment: that one stays."""
    prepare_module = sys.modules[prepare.__module__]
    config = make_config(corpus[1])
    [store] = prepare(config.data, progress=False)
    shutil.copytree(store.path, f'{store.path}.faster')
    Path(store.tokenizer).unlink()
    aside = prepare_module.move_aside

    def late(path):
        shutil.rmtree(path)
        shutil.move(f'{path}.faster', path)
        (path / 'of the faster').touch()
        return aside(path)

    monkeypatch.setattr(prepare_module, 'move_aside', late)
    assert prepare(config.data, progress=False) == [store] and Path(store.path, 'of the faster').exists()
    assert not [name for name in contents(Path(store.path).parent) if '.tmp' in name]


def as_format_1(store, cache: Path, key: str) -> None:
    """Puts a store where the version before left it, as it wrote it."""
    path = cache / key
    shutil.move(store.path, path)
    record = json.loads((path / 'metadata.json').read_text())
    for name in ('round_trip', 'files', 'split', 'skipped', 'checksum'):
        del record[name]
    record['source'] = {key: record['source'][key] for key in ('spec', 'fingerprint')}
    (path / 'metadata.json').write_text(json.dumps(record | {'version': 1}))


@pytest.mark.parametrize('count', [1, 40])
def test_stores_of_format_1_are_found(make_config, tmp_path, count):
    from mixcon_jax.data.cache import names, split_is_the_hash
    from mixcon_jax.data.sources import open_source

    spec = f'files:{write_jsonl(tmp_path / "a.jsonl", make_texts(count))}'
    other = f'files:{write_jsonl(tmp_path / "b.jsonl", make_texts(40, seed=1))}'
    config = make_config(spec)
    [store] = prepare(config.data, progress=False)
    identity, tokenizer = store.fingerprint, store.load_tokenizer()
    as_format_1(store, tmp_path / 'cache', names(open_source(spec), tokenizer, config.data, [])['old'])
    said = []
    [found] = prepare(config.data, progress=said.append)
    assert found.fingerprint == identity and found.metadata['version'] == 1
    assert split_is_the_hash(found) == (count > 1)
    # In a mixture only where the hash alone made its split.
    mixture = make_config(spec, other, tokenizer=found.tokenizer)
    versions = [store.metadata['version'] for store in prepare(mixture.data, progress=False)]
    assert versions == [1 if count > 1 else 2, 2]


def test_an_interrupted_preparation_leaves_nothing(make_config, corpus, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    config = make_config(corpus[1])
    with monkeypatch.context() as patch:
        patch.setattr('mixcon_jax.data.statistics.Statistics.add', interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config.data, progress=False)
    assert [name.rpartition('-')[0] for name in contents(tmp_path / 'cache')] == ['tokenizer']
    assert prepare(config.data, progress=False)
