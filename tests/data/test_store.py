"""Token stores: what is written is read, from memory and from disk, and damage is noticed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mixcon_jax.data import store_writer
from mixcon_jax.data.store import TokenStore
from mixcon_jax.data.store_writer import StoreWriter
from mixcon_jax.errors import UserError
from tests.data.cases import METADATA


def write(
    path: Path, seed: int = 0, dtype=np.uint16, count: int = 60
) -> tuple[list[np.ndarray], list[bool], list[int]]:
    draw = np.random.default_rng(seed)
    documents = [draw.integers(0, np.iinfo(dtype).max, n, dtype, endpoint=True) for n in draw.integers(0, 50, count)]
    heldout = (draw.random(count) < 0.3).tolist()
    sizes = draw.integers(0, 2**40, count).tolist()
    writer = StoreWriter(path, np.dtype(dtype))
    for document, size, side in zip(documents, sizes, heldout, strict=True):
        writer.add(document, size, side)
    writer.finish(METADATA)
    return documents, heldout, sizes


@pytest.mark.parametrize('dtype', [np.uint16, np.uint32])
@pytest.mark.parametrize('memory_limit', [0, 1 << 20])
@pytest.mark.parametrize('shard, chunk', [(128, 16), (store_writer.SHARD, store_writer.CHUNK)])
@pytest.mark.parametrize('url', [False, True])
def test_reads_what_was_written(tmp_path, monkeypatch, dtype, memory_limit, shard, chunk, url):
    monkeypatch.setattr(store_writer, 'SHARD', shard)
    monkeypatch.setattr(store_writer, 'CHUNK', chunk)
    path = tmp_path / 's'
    documents, heldout, sizes = write(path, dtype=dtype)
    for split, side in (('train', False), ('heldout', True)):
        store = TokenStore.open(f'file://{path}' if url else path, split, memory_limit)
        mine = [document for document, other in zip(documents, heldout, strict=True) if other == side]
        assert store.num_documents == len(mine) == len(store.starts)
        assert store.num_tokens == sum(map(len, mine)) == store.num_targets - len(mine)
        assert store.num_bytes == sum(size for size, other in zip(sizes, heldout, strict=True) if other == side)
        assert (store.eot_id, store.tokenizer_fingerprint) == (3, 'f')
        got = store.read_many(store.starts, store.starts + store.lengths)
        assert all(np.array_equal(a, b) for a, b in zip(got, mine, strict=True))
        assert np.array_equal(store.read(5, 400), np.concatenate(documents)[5:400])
    counts = json.loads((path / 'metadata.json').read_text())['counts']
    assert counts['train']['tokens'] + counts['heldout']['tokens'] == sum(map(len, documents))
    assert (len(list((path / 'tokens' / 'c').iterdir())) > 1) == (shard == 128)


def test_shards_are_written_whole_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, 'SHARD', 64)
    monkeypatch.setattr(store_writer, 'CHUNK', 16)
    writes, original = [], store_writer._Appender._write
    monkeypatch.setattr(
        store_writer._Appender, '_write', lambda self, values: (writes.append(values.size), original(self, values))
    )
    writer = StoreWriter(tmp_path / 's', np.dtype(np.uint16))
    for size in (10, 200, 3, 64, 0, 41):
        writer.add(np.zeros(size, np.uint16), 1, False)
    writer._tokens.finish()
    assert writes == [64, 64, 64, 64, 62] and writer.num_tokens == 318


def damage(path: Path, name: str) -> None:
    """Flips a bit in the middle of the largest file of an array."""
    file = max((path / name / 'c').rglob('*'), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize('name', ['tokens', 'offsets', 'bytes', 'split'])
@pytest.mark.parametrize('memory_limit', [0, 1 << 20])
def test_a_flipped_bit_is_noticed(tmp_path, name, memory_limit):
    write(tmp_path / 's')
    damage(tmp_path / 's', name)

    def use() -> None:
        store = TokenStore.open(tmp_path / 's', 'train', memory_limit)
        store.read(0, store.num_tokens)

    with pytest.raises(UserError, match=f'damaged token store: {name}') as error:
        use()
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['tokens', 'offsets', 'bytes', 'split'])
def test_an_array_of_another_store_is_noticed(tmp_path, name):
    write(tmp_path / 'a', seed=0)
    write(tmp_path / 'b', seed=1)
    shutil.rmtree(tmp_path / 'a' / name)
    shutil.copytree(tmp_path / 'b' / name, tmp_path / 'a' / name)
    with pytest.raises(UserError, match='damaged token store'):
        TokenStore.open(tmp_path / 'a', 'train')


def test_missing_parts_are_noticed(tmp_path):
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as error:
            TokenStore.open(tmp_path / 's', 'train')
        assert '\n' not in str(error.value)

    refused('not a token store: it has no metadata.json')
    write(tmp_path / 's')
    for name in ('c', 'zarr.json'):
        part = tmp_path / 's' / 'tokens' / name
        part.rename(tmp_path / 'aside')
        refused(f'damaged token store: tokens/{name}.* is missing')
        (tmp_path / 'aside').rename(part)
    metadata = tmp_path / 's' / 'metadata.json'
    record = json.loads(metadata.read_text())
    for name, value in (('eot_id', 4), ('counts', record['counts'] | {'train': record['counts']['heldout']})):
        metadata.write_text(json.dumps(record | {name: value}))
        refused('metadata.json differs from its checksum')
    for name, value, words in (
        ('eot_id', '3', "has a str as 'eot_id'"),
        ('eot_id', True, "has a bool as 'eot_id'"),
        ('counts', [], "has a list as 'counts'"),
        ('counts', record['counts'] | {'train': {'tokens': 1, 'bytes': 1}}, "lacks 'counts.train.documents'"),
        ('sha256', {'tokens': 'x'}, "lacks 'sha256.offsets'"),
        ('files', {'tokens/c/0': '3'}, "has a str as 'files.tokens/c/0'"),
        ('baselines', record['baselines'] | {'train_bytes': [1]}, "has no list of 256 as 'baselines.train_bytes'"),
        ('round_trip', None, "has a NoneType as 'round_trip'"),
    ):
        metadata.write_text(json.dumps(record | {name: value}))
        refused(f'metadata.json {words}')
    metadata.write_text(json.dumps([record]))
    refused('metadata.json is not readable')
    metadata.write_text(json.dumps({**record, 'version': 99}))
    refused('format 99')
    metadata.write_text(json.dumps({'version': 1}))
    refused('metadata.json lacks')
    metadata.write_text('{"vers')
    refused('metadata.json is not readable')
    with pytest.raises(UserError, match='cannot be read'):
        TokenStore.open('nosuch://bucket/x', 'train')


def refused(path: Path, words: str, memory_limit: int = 0) -> None:
    with pytest.raises(UserError, match=words) as error:
        TokenStore.open(path, 'train', memory_limit)
    assert '\n' not in str(error.value) and 'restore it, or delete the folder and prepare the text again' in str(
        error.value
    )


@pytest.mark.parametrize('version', [1, 2])
def test_every_part_must_be_there_before_anything_is_read(tmp_path, monkeypatch, version):
    """Tokens that are not held in memory: a missing file would read as zeros, which are tokens."""
    monkeypatch.setattr(store_writer, 'SHARD', 128)
    monkeypatch.setattr(store_writer, 'CHUNK', 16)
    path = tmp_path / 's'
    write(path)
    record = json.loads((path / 'metadata.json').read_text())
    names = sorted(record['files'])
    assert names == sorted(
        file.relative_to(path).as_posix() for file in path.rglob('*') if file.parent != path and file.is_file()
    )
    if version == 1:  # without sizes; the small arrays are read whole and compared with their checksums
        del record['files'], record['checksum']
        (path / 'metadata.json').write_text(json.dumps({**record, 'version': 1}))
    TokenStore.open(path, 'train', 0)
    for name in names:
        (path / name).rename(tmp_path / 'aside')
        refused(path, f'damaged token store: {name}' if version == 2 else 'damaged token store: ')
        (tmp_path / 'aside').rename(path / name)
        if version == 2:
            whole = (path / name).read_bytes()
            (path / name).write_bytes(whole[:-1])
            refused(path, f'{name} has {len(whole) - 1} bytes, not {len(whole)}')
            (path / name).write_bytes(whole)
    TokenStore.open(path, 'train', 0)


def test_a_part_that_goes_missing_later_is_no_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, 'SHARD', 128)
    monkeypatch.setattr(store_writer, 'CHUNK', 16)
    write(tmp_path / 's')
    store = TokenStore.open(tmp_path / 's', 'train', 0)
    (tmp_path / 's' / 'tokens' / 'c' / '3').unlink()
    store.read(0, 384)
    with pytest.raises(UserError, match='damaged token store: tokens cannot be read'):
        store.read(380, 390)


@pytest.mark.parametrize('memory_limit', [0, 1 << 20])
def test_tokens_that_are_zero_are_no_missing_ones(tmp_path, monkeypatch, memory_limit):
    monkeypatch.setattr(store_writer, 'SHARD', 64)
    monkeypatch.setattr(store_writer, 'CHUNK', 16)
    writer = StoreWriter(tmp_path / 's', np.dtype(np.uint16))
    writer.add(np.zeros(200, np.uint16), 1, False)
    writer.finish(METADATA)
    assert TokenStore.open(tmp_path / 's', 'train', memory_limit).read(0, 200).tolist() == [0] * 200


def test_folders_whose_names_are_not_utf8_are_refused():
    with pytest.raises(UserError, match='not UTF-8'):
        TokenStore.open('/tmp/caf\udce9', 'train')
