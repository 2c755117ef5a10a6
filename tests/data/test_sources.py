"""Sources: documents in a fixed order, and errors that name the file and the place in it."""

import gzip
import json
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mixcon_jax.data import files
from mixcon_jax.data.sources import open_source
from mixcon_jax.errors import UserError
from tests.data.cases import make_texts, write_jsonl

COMPRESS = {'': bytes, '.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}


def texts_of(spec: str, **options) -> list[str]:
    return [document.text for document in open_source(spec, **options)]


def one_line(error) -> str:
    message = str(error.value)
    assert message and '\n' not in message
    return message


def test_stdlib_has_real_text_in_a_fixed_order():
    source = open_source('stdlib')
    documents = list(source)
    names = [document.name for document in documents]
    assert len(set(names)) == len(names) > 400
    assert {'argparse.py', 'json/decoder.py', 'topics/yield'} <= set(names)
    size = sum(len(document.text.encode()) for document in documents)
    assert 7e6 < size < 12e6
    assert not any(name.startswith(('test/', 'idlelib/', 'encodings/', 'site-packages/')) for name in names)
    again = open_source('stdlib')
    assert list(again) == documents and again.fingerprint() == source.fingerprint()


def test_stdlib_fingerprint_has_the_python_version(monkeypatch):
    before = open_source('stdlib').fingerprint()
    monkeypatch.setattr('platform.python_version', lambda: '3.99.1')
    assert open_source('stdlib').fingerprint() != before


@pytest.mark.parametrize('compression', COMPRESS)
def test_text_files_are_documents_in_path_order(tmp_path, compression):
    texts = make_texts(5)
    for i, text in enumerate(texts):
        folder = tmp_path / 'a' / ('b' if i % 2 else '.')
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{i}.txt{compression}').write_bytes(COMPRESS[compression](text.encode()))
    assert texts_of(f'files:{tmp_path}/**/*.txt{compression}') == [texts[i] for i in (0, 2, 4, 1, 3)]


@pytest.mark.parametrize('compression', COMPRESS)
def test_jsonl_lines_are_documents(tmp_path, compression):
    texts = make_texts(30)
    data = ''.join(
        json.dumps({'body': text}, ensure_ascii=i % 2 == 0) + '\n\n' * (i % 3) + '\n' for i, text in enumerate(texts)
    )
    path = tmp_path / f'x.jsonl{compression}'
    path.write_bytes(COMPRESS[compression](('\ufeff' + data.rstrip('\n')).encode()))
    assert texts_of(f'files:{path}', text_field='body') == texts


@pytest.mark.parametrize('compression', ['.gz', '.zst'])
def test_compressed_files_of_several_frames(tmp_path, compression, monkeypatch):
    monkeypatch.setattr(files, 'BLOCK', 160)  # so that frames end anywhere in the blocks that are read
    texts = make_texts(30)
    frames = [COMPRESS[compression](text.encode()) for text in texts]
    (tmp_path / f'x.txt{compression}').write_bytes(b''.join(frames))
    assert texts_of(f'files:{tmp_path}/x.txt{compression}') == [''.join(texts)]


def test_a_mark_of_utf8_is_no_text(tmp_path):
    (tmp_path / 'a.txt').write_bytes('\ufeffab\ufeff'.encode())
    assert texts_of(f'files:{tmp_path}/a.txt') == ['ab\ufeff']


def test_gzip_padding_and_empty_files(tmp_path):
    (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'abc') + bytes(700))
    (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(b'') + bytes(70))
    assert texts_of(f'files:{tmp_path}/*.gz') == ['abc', '']


def test_parquet_rows_are_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'ROWS', 7)
    texts = make_texts(50)
    table = pyarrow.table({'id': list(range(50)), 'content': texts})
    pyarrow.parquet.write_table(table, tmp_path / 'x.parquet', row_group_size=20)
    assert texts_of(f'files:{tmp_path}/*.parquet', text_field='content') == texts
    with pytest.raises(UserError) as error:
        texts_of(f'files:{tmp_path}/*.parquet')
    assert "x.parquet: no field 'text' (data.text_field); it has 'id', 'content'" in one_line(error)


def test_a_sample_takes_from_every_file(tmp_path):
    for name in 'abcd':
        write_jsonl(tmp_path / f'{name}.jsonl', [name * 400_000] * 10)
    taken = [document.text[0] for document in open_source(f'files:{tmp_path}/*.jsonl').sample(1 << 21)]
    assert sorted(set(taken)) == list('abcd') and len(taken) < 40


def test_files_fingerprint_changes_with_the_files(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', ['x'])
    spec = f'files:{tmp_path}/*.jsonl'
    prints = [open_source(spec).fingerprint(), open_source(spec, text_field='b').fingerprint()]
    path.write_text(path.read_text() + '\n')
    prints.append(open_source(spec).fingerprint())
    write_jsonl(tmp_path / 'b.jsonl', ['y'])
    prints.append(open_source(spec).fingerprint())
    assert len(set(prints)) == 4
    assert prints[3] == open_source(spec).fingerprint()


BAD_FILES = [
    ('a.txt', b'text\0more', 'a.txt: binary, not text: a NUL byte at byte offset 4'),
    ('a.txt', 'é'.encode() + b'\xff', 'a.txt: not UTF-8 text: byte 0xff at byte offset 2'),
    ('a.txt', 'text'.encode('utf-16'), 'a.txt: UTF-16, not UTF-8 text; write it anew: iconv -f UTF-16'),
    ('a.txt', b'ab\xe2\x88', 'a.txt: not UTF-8 text: byte 0xe2 at byte offset 2 (unexpected end of data)'),
    ('a.txt', np.random.default_rng(0).bytes(1000), 'a.txt: '),
    ('a.txt.gz', gzip.compress(b'ab\0'), 'a.txt.gz: binary, not text: a NUL byte at byte offset 2'),
    ('a.txt.gz', b'plain text', 'a.txt.gz: not a valid .gz file'),
    ('a.txt.zst', b'plain text', 'a.txt.zst: not a valid .zst file'),
    ('a.jsonl', b'{"text": "a"}\n{"text": "b\xff"}\n', 'a.jsonl:2: not UTF-8 text: byte 0xff at byte offset 25'),
    ('a.jsonl', b'{"text": "a"}\n\n{"text": "b', 'a.jsonl:3: not valid JSON'),
    ('a.jsonl', b'{"text": "a"}\n{"text": "b', 'is the file truncated?'),
    ('a.jsonl', b'{"text": "a"}\n{text: "b"}\n{}', 'a.jsonl:2: not valid JSON (Expecting property name'),
    ('a.jsonl', b'{"text": "a"}\n[1]\n', "a.jsonl:2: a list, expected an object with the field 'text'"),
    ('a.jsonl', b'{"body": "a", "id": 1}\n', "a.jsonl:1: no field 'text' (data.text_field); it has 'body', 'id'"),
    ('a.jsonl', b'{}\n', "a.jsonl:1: no field 'text' (data.text_field); it has no fields"),
    ('a.jsonl', b'{"text": 3}\n', "a.jsonl:1: field 'text' is a int, expected a string"),
    ('a.jsonl', b'{"text": "a\\ud800b"}\n', "a.jsonl:1: field 'text' has a lone surrogate at character 1"),
    ('a.jsonl', b'[' * 200_000 + b'\n', 'a.jsonl:1: not valid JSON'),
    ('a.parquet', b'PAR1 nothing', 'a.parquet: not a readable Parquet file'),
    ('a.md', b'text', "a.md: unknown suffix '.md'; known: .txt .jsonl .parquet"),
    ('a.json', b'{}', "a.json: unknown suffix '.json'; did you mean .jsonl?"),
    ('a.parquet.gz', b'', 'Parquet files compress their own columns'),
]  # fmt: skip


@pytest.mark.parametrize('name, data, words', BAD_FILES, ids=[words for _, _, words in BAD_FILES])
def test_bad_files_are_named_in_one_line(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        texts_of(f'files:{tmp_path}/a.*')
    assert words in one_line(error)


@pytest.mark.parametrize('compression', ['.gz', '.zst'])
@pytest.mark.parametrize('keep', [0, 3, 0.5, -1])
def test_truncated_compressed_files_are_noticed(tmp_path, compression, keep):
    whole = COMPRESS[compression](''.join(make_texts(200)).encode())
    path = tmp_path / f'a.txt{compression}'
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError) as error:
        texts_of(f'files:{path}')
    assert f'a.txt{compression}: truncated after' in one_line(error)


@pytest.mark.parametrize(
    'spec, words',
    [
        ('files:/nowhere/*.txt', "no file matches '/nowhere/*.txt' (looked in /nowhere)"),
        ('files:{tmp}', 'is a folder'),
        ('files:{tmp}/*.txt', 'no file matches'),
        ('stdlb', 'did you mean stdlib?'),
        ('file:x.txt', 'did you mean files:GLOB?'),
        ('files:', 'write files:GLOB'),
        ('hugingface:x', 'did you mean huggingface:NAME[/SUBSET]?'),
        ('huggingface:', 'write huggingface:NAME[/SUBSET]'),
        ('data/*.txt', "write 'files:data/*.txt'"),
        ('qqq', 'known: stdlib, files:GLOB, huggingface:NAME[/SUBSET]'),
    ],
)
def test_unknown_sources_are_refused_with_a_hint(tmp_path, spec, words):
    with pytest.raises(UserError) as error:
        open_source(spec.format(tmp=tmp_path))
    assert words in one_line(error)


def fake_datasets(monkeypatch, contents: dict) -> None:
    """Stands in for the package: ``contents`` maps (name, subset) to records."""

    def load_dataset(name, subset, split, streaming):
        assert split == 'train' and streaming
        if (name, subset) not in contents:
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nsecond line")
        return contents[name, subset]

    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))


def test_huggingface_names_and_subsets(monkeypatch):
    records = {
        ('plain', None): [{'text': 'a'}],
        ('org/name', None): [{'text': 'b'}, {'text': 'c'}],
        ('org/name', 'sub'): [{'text': 'd'}],
        ('plain', 'sub'): [{'text': 'e'}],
    }
    fake_datasets(monkeypatch, records)
    specs = ['plain', 'org/name', 'org/name/sub', 'plain/sub']
    assert [texts_of(f'huggingface:{spec}') for spec in specs] == [['a'], ['b', 'c'], ['d'], ['e']]
    assert len({open_source(f'huggingface:{spec}').fingerprint() for spec in specs}) == 4


def test_huggingface_errors(monkeypatch):
    def breaks():
        yield {'text': 'a'}
        raise ConnectionError('lost\nthe line')

    fake_datasets(monkeypatch, {('a', None): [{'text': 'x'}, {'body': 'y'}], ('b', None): breaks()})
    cases = {
        'huggingface:a': "huggingface:a: record 1: no field 'text' (data.text_field); it has 'body'",
        'huggingface:b': 'huggingface:b: reading record 1 failed: lost',
        'huggingface:c/d': "'huggingface:c/d' could not be opened: Dataset 'c/d' doesn't exist on the Hub second line",
        'huggingface:a/b/c/d': 'is not huggingface:[ORG/]NAME[/SUBSET]',
    }
    for spec, words in cases.items():
        with pytest.raises(UserError) as error:
            texts_of(spec)
        assert words in one_line(error)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match='needs the package datasets: pip install datasets'):
        open_source('huggingface:a')


@pytest.mark.parametrize('indices', [None, pyarrow.int8(), pyarrow.int32()])
def test_parquet_that_is_not_utf8_is_named_with_its_row(tmp_path, monkeypatch, indices):
    """Also in columns that were written as dictionaries."""
    monkeypatch.setattr(files, 'ROWS', 2)
    values = pyarrow.array([b'a', b'b', b'caf\xe9', b'c']).view(pyarrow.string())
    if indices is not None:
        values = pyarrow.DictionaryArray.from_arrays(pyarrow.array(range(4), indices), values)
    pyarrow.parquet.write_table(pyarrow.table({'text': values}), tmp_path / 'x.parquet')
    with pytest.raises(UserError) as error:
        texts_of(f'files:{tmp_path}/*.parquet')
    assert "x.parquet: row 2: field 'text' is not UTF-8 text: byte 0xe9 at byte offset 3" in one_line(error)
    assert texts_of(f'files:{tmp_path}/*.parquet', skip=True) == ['a', 'b', 'c']


def test_bad_records_are_left_out_and_counted(tmp_path):
    lines = [b'{"text": "a"}', b'{"text": "cut', b'{"body": "b"}', b'{"text": 3}', b'{"text": "\xff"}', b'', b'[1]']
    (tmp_path / 'a.jsonl').write_bytes(b'\n'.join([*lines, b'{"text": "\\ud800"}', b'{"text": "z"}']))
    (tmp_path / 'b.txt').write_bytes(b'caf\xe9')
    source = open_source(f'files:{tmp_path}/*', skip=True)
    for _ in range(2):  # counted anew each time
        assert [document.text for document in source] == ['a', 'z']
        assert source.skipped.count == 7 and 'a.jsonl:2: not valid JSON' in source.skipped.first
    assert source.fingerprint() != open_source(f'files:{tmp_path}/*').fingerprint()
    # A file that ends too early is no bad record: nobody knows what else is missing.
    for end in (b'{"text": "b', b'{"text": "caf\xc3', b'{"text": "b"', b'{"text": "b\0\0\0'):
        (tmp_path / 'end.jsonl').write_bytes(b'{"text": "a"}\n' + end)
        with pytest.raises(UserError, match=r'end.jsonl:2: .*; it has no line end: is the file truncated\?'):
            texts_of(f'files:{tmp_path}/end.jsonl', skip=True)
    (tmp_path / 'end.jsonl').write_bytes(b'{"text": "a"}\n{"body": "b"}')  # whole, and of no use
    assert texts_of(f'files:{tmp_path}/end.jsonl', skip=True) == ['a']
    (tmp_path / 'c.txt.gz').write_bytes(gzip.compress(b'text' * 99)[:-9])
    with pytest.raises(UserError, match='truncated'):
        list(source.__class__(f'files:{tmp_path}/*', skip=True))


def test_zst_with_a_long_window(tmp_path):
    """As `zstd --long=31` writes it: more than the 128 MiB that decompressors allow unless told."""
    window = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(
        compression_params=window
    ).compressobj()  # without the size, the window counts
    (tmp_path / 'a.txt.zst').write_bytes(compressor.compress(b'text') + compressor.flush())
    assert texts_of(f'files:{tmp_path}/*.zst') == ['text']
