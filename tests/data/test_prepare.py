"""Preparation: whole or not at all, whatever kills it; found again; the same from any number of tries."""

import errno
import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mixcon_jax.data import TokenStore, baselines, prepare, store_writer
from mixcon_jax.errors import UserError
from tests.data.cases import make_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def one_line_error(data) -> str:
    with pytest.raises(UserError) as error:
        prepare(data, progress=False)
    assert '\n' not in str(error.value)
    return str(error.value)


def contents(cache: str | os.PathLike) -> list[str]:
    """What lies in the cache, but for the folder of locks."""
    return sorted(path.name for path in Path(cache).glob('*') if path.name != '.locks')


def texts_of(prepared, split: str) -> list[str]:
    store, tokenizer = prepared.open(split), prepared.load_tokenizer()
    return [tokenizer.decode(ids) for ids in store.read_many(store.starts, store.starts + store.lengths)]


def test_a_store_has_every_document_of_its_source(make_config, corpus):
    texts, spec = corpus
    config = make_config(spec)
    [prepared] = prepare(config.data, progress=False)
    train, heldout = (texts_of(prepared, split) for split in ('train', 'heldout'))
    assert Counter(train + heldout) == Counter(texts) and train and heldout
    assert [text for text in texts if text in set(train)] == train  # in the order of the source
    metadata = prepared.metadata
    assert metadata['source']['spec'] == prepared.spec == spec
    assert sum(count['bytes'] for count in metadata['counts'].values()) == sum(len(text.encode()) for text in texts)
    assert Path(prepared.tokenizer).parent == Path(prepared.path)


def test_what_is_prepared_is_found_again(make_config, corpus, tmp_path):
    config, lines = make_config(corpus[1]), []
    first = prepare(config.data, progress=lines.append)
    assert any(line.startswith('tokenizer: ') for line in lines) and 'documents/s' in lines[-1] and 'MB/s' in lines[-1]
    first_print = first[0].fingerprint
    before = {path: path.stat().st_mtime_ns for path in Path(first[0].path).rglob('*')}
    lines.clear()
    assert prepare(config.data, progress=lines.append) == first
    assert len(lines) == 1 and 'already prepared, 40 documents' in lines[0]
    assert before == {path: path.stat().st_mtime_ns for path in Path(first[0].path).rglob('*')}
    # Whatever changes the result makes another store.
    paths = {first[0].path}
    for options in ({'tokenizer_vocab_size': 310}, {'heldout_fraction': 0.3}):
        paths.add(prepare(make_config(corpus[1], **options).data, progress=False)[0].path)
    write_jsonl(tmp_path / 'corpus.jsonl', make_texts(41))
    paths.add(prepare(config.data, progress=False)[0].path)
    assert len(paths) == 4
    config.data.cache_dir = str(tmp_path / 'elsewhere')
    [copy] = prepare(config.data, progress=False)
    assert copy.fingerprint == prepare(make_config(corpus[1]).data, progress=False)[0].fingerprint != first_print


def test_several_sources_share_a_tokenizer(make_config, tmp_path):
    specs = []
    for name, alphabet in (('latin', 'lorem ipsum '), ('greek', 'λόγος ')):
        (tmp_path / f'{name}.txt').write_text(alphabet * 300)
        specs.append(f'files:{tmp_path}/{name}.txt')
    stores = prepare(make_config(*specs).data, progress=False)
    assert [store.spec for store in stores] == specs
    tokenizers = [store.load_tokenizer() for store in stores]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint
    assert all(len(tokenizers[0].encode(text)) < len(text) / 2 for text in ('lorem ipsum ' * 9, 'λόγος ' * 9))


def test_the_tokenizer_does_not_see_heldout_text(make_config, tmp_path):
    (tmp_path / 'a.txt').write_text('abc ' * 900 + '\n' + 'Straße ' * 200)
    [prepared] = prepare(make_config(f'files:{tmp_path}/a.txt', heldout_fraction=0.28).data, progress=False)
    tokenizer = prepared.load_tokenizer()
    assert len(tokenizer.encode('abc abc abc')) < 5 and len(tokenizer.encode('Straße')) == 7


def test_one_file_is_cut_into_training_and_heldout_text(make_config, tmp_path):
    text = ''.join(f'{i} é\n' for i in range(1000))
    (tmp_path / 'book.txt').write_text(text)
    [prepared] = prepare(make_config(f'files:{tmp_path}/book.txt').data, progress=False)
    [train], [heldout] = texts_of(prepared, 'train'), texts_of(prepared, 'heldout')
    assert train + heldout == text and len(heldout) / len(text) == pytest.approx(0.2, rel=0.1)


def test_baselines(make_config, corpus):
    stores = prepare(make_config(corpus[1]).data, progress=False)
    train, heldout = (texts_of(stores[0], split) for split in ('train', 'heldout'))
    counts, data = Counter(''.join(train).encode()), ''.join(heldout).encode()
    total = sum(counts.values())
    unigram = -sum(math.log2((counts[byte] + 1) / (total + 256)) for byte in data) / len(data)
    packed = len(gzip.compress(b''.join(text.encode() + b'\0' for text in heldout), 9))
    got = baselines(stores)
    assert got['unigram'] == pytest.approx(unigram, rel=1e-12)
    assert got['gzip'] == pytest.approx(8 * packed / len(data), rel=1e-12)
    assert baselines(stores * 2) == pytest.approx(got, rel=0.05)


def test_given_tokenizers_and_stores(make_config, corpus, tmp_path):
    _, spec = corpus
    [own] = prepare(make_config(spec, tokenizer_vocab_size=290).data, progress=False)
    given = make_config(spec, tokenizer=own.tokenizer, cache_dir=str(tmp_path / 'other'))
    [again] = prepare(given.data, progress=False)
    assert again.metadata['tokenizer'] == own.metadata['tokenizer'] and len(contents(tmp_path / 'other')) == 1
    # A prepared store is a source, and brings its tokenizer.
    write_jsonl(tmp_path / 'more.jsonl', make_texts(20, seed=9))
    both = prepare(make_config(f'store:{own.path}', f'files:{tmp_path}/more.jsonl').data, progress=False)
    assert both[0].path == own.path and both[1].metadata['tokenizer'] == own.metadata['tokenizer']
    [third] = prepare(make_config(spec, tokenizer_vocab_size=280).data, progress=False)
    assert 'made by another tokenizer' in one_line_error(
        make_config(f'store:{own.path}', tokenizer=third.tokenizer).data
    )
    assert 'made by another tokenizer' in one_line_error(make_config(f'store:{own.path}', f'store:{third.path}').data)
    assert 'not a token store' in one_line_error(make_config(f'store:{tmp_path}').data)


def test_a_swapped_tokenizer_is_noticed(make_config, corpus):
    a, b = (prepare(make_config(corpus[1], tokenizer_vocab_size=n).data, progress=False)[0] for n in (290, 300))
    Path(a.tokenizer).write_text(Path(b.tokenizer).read_text())
    with pytest.raises(UserError, match='made by another tokenizer'):
        a.load_tokenizer()


BAD = {
    'empty': ('a.txt', b'', 'is empty: 1 documents, none of them with text'),
    'no lines': ('a.jsonl', b'', 'is empty: 0 documents'),
    'blank fields': ('a.jsonl', b'{"text": ""}\n' * 3, 'is empty: 3 documents'),
    'one letter': ('a.txt', b'x', 'one document of 1 character'),
    'binary': ('a.txt', b'some text\0\1', 'a.txt: binary, not text: a NUL byte at byte offset 9'),
    'cut line': ('a.jsonl', b'{"text": "a"}\n{"text": "b', 'a.jsonl:2: not valid JSON'),
    'late': ('a.jsonl', b''.join(b'{"text": "%d"}\n' % i for i in range(99)) + b'{}', "a.jsonl:100: no field 'text'"),
    'cut gzip': ('a.txt.gz', gzip.compress(bytes(range(32, 99)) * 9)[:-9], 'a.txt.gz: truncated'),
}


@pytest.mark.parametrize('name, data, words', BAD.values(), ids=BAD)
def test_bad_corpora_leave_nothing_behind(make_config, tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    config = make_config(f'files:{tmp_path}/{name}')
    assert words in one_line_error(config.data)
    assert contents(config.data.cache_dir) == []
    # Nor when the tokenizer exists, so that the text is first read while the store is written.
    good = tmp_path / 'good' / 'g.txt'
    good.parent.mkdir()
    good.write_text('good text ' * 50)
    [store] = prepare(make_config(f'files:{good}').data, progress=False)
    before = contents(config.data.cache_dir)
    config.data.tokenizer = store.tokenizer
    assert words in one_line_error(config.data)
    assert contents(config.data.cache_dir) == before


def test_bad_places_are_refused(make_config, corpus, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'cannot write here' in one_line_error(make_config(corpus[1], cache_dir=str(tmp_path / 'file')).data)
    assert 'cannot write here' in one_line_error(make_config(corpus[1], cache_dir=str(tmp_path / 'file' / 'x')).data)
    assert 'No such file' in one_line_error(make_config(corpus[1], tokenizer=str(tmp_path / 'no.json')).data)


@pytest.mark.parametrize('where', ['_write', 'finish'])
@pytest.mark.parametrize(
    'error', [OSError(errno.ENOSPC, 'x'), ValueError("RESOURCE_EXHAUSTED: No room [os_error_code='122']")]
)
def test_a_full_disk_is_one_line(make_config, corpus, monkeypatch, where, error):
    def full(*_):
        raise error

    monkeypatch.setattr(store_writer._Appender, where, full)
    config = make_config(corpus[1])
    assert 'disk full' in one_line_error(config.data)
    assert [name for name in contents(config.data.cache_dir) if not name.startswith('tokenizer-')] == []
    monkeypatch.undo()
    prepare(config.data, progress=False)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run(
        [sys.executable, '-c', script, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


PREPARE = """
import json, os, random, signal, sys, time
from pathlib import Path
from mixcon_jax import config as config_lib
from mixcon_jax.data import prepare
config = config_lib.default()
config.data.cache_dir, config.data.sources, config.data.heldout_fraction = sys.argv[1], (sys.argv[2],), 0.2
"""

FULL_DISK = (
    PREPARE
    + """
from mixcon_jax.errors import UserError
try:
    prepare(config.data, progress=False)
except UserError as error:
    print(error)
print(json.dumps(sorted(name for name in os.listdir(sys.argv[1]) if '.tmp' in name or name.startswith('corpus-'))))
"""
)


@pytest.mark.parametrize('size', ['32k', '160k'])
def test_a_disk_that_is_really_full(tmp_path, size):
    """A file system of its own, too small for the tokenizer, or for the tokens."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['unshare', '-rm', 'sh', '-c', f'mount -t tmpfs -o size={size} none {disk} && exec "$@"', 'sh']
    try:
        subprocess.run([*mount, 'true'], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('no unprivileged mounts here')
    source = write_jsonl(tmp_path / 'corpus.jsonl', make_texts(6000))
    command = [*mount, sys.executable, '-c', FULL_DISK, str(disk), f'files:{source}']
    result = subprocess.run(command, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and 'disk full' in lines[0] and json.loads(lines[1]) == [], result.stdout + result.stderr


# The parent imports once and forks, so that a kill hits the preparation and not the imports.
KILLED = (
    PREPARE
    + """
def child():
    pid = os.fork()
    if not pid:
        prepare(config.data, progress=False)
        os._exit(0)
    return pid

draw, dead, begin = random.Random(int(sys.argv[3])), 0, time.monotonic()
os.waitpid(child(), 0)  # how long it takes here
span = 1.1 * (time.monotonic() - begin)
os.rename(sys.argv[1], sys.argv[1] + '-measured')
for attempt in range(12):
    pid = child()
    time.sleep(draw.uniform(0, span))
    os.kill(pid, signal.SIGKILL)
    dead += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    done = [path for path in Path(sys.argv[1]).glob('corpus-*') if '.tmp' not in path.name]
    if done:  # begin again; the tokenizer stays
        os.rename(done[0], f'{sys.argv[1]}-whole-{attempt}')
print(dead, flush=True)
prepare(config.data, progress=False)
"""
)


def test_killed_preparations_leave_no_half_store(make_config, tmp_path):
    seed = int.from_bytes(os.urandom(4))  # shown with the values of a failed test
    source = f'files:{write_jsonl(tmp_path / "corpus.jsonl", make_texts(3000))}'
    options = {'heldout_fraction': 0.2, 'tokenizer_vocab_size': 2048}
    [whole] = prepare(make_config(source, **options, cache_dir=str(tmp_path / 'once')).data, progress=False)
    result = run(KILLED, str(tmp_path / 'killed'), source, str(seed))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0  # kills that hit
    assert contents(tmp_path / 'killed') == contents(tmp_path / 'once')  # and no leftovers
    for cache in [tmp_path / 'killed' / Path(whole.path).name, *tmp_path.glob('killed-whole-*')]:
        store = TokenStore.open(cache, 'train')
        assert store.num_targets == whole.open('train').num_targets
        assert json.loads((cache / 'metadata.json').read_text()) == whole.metadata


CONCURRENT = (
    PREPARE
    + """
pids = []
for process in range(4):
    pids.append(os.fork())
    if not pids[-1]:
        lines = []
        prepare(config.data, progress=lines.append)
        Path(f'{sys.argv[3]}/{process}.json').write_text(json.dumps(lines))
        os._exit(0)
for pid in pids:
    assert os.waitpid(pid, 0)[1] == 0
"""
)


def test_concurrent_preparations_do_the_work_once(tmp_path):
    source = f'files:{write_jsonl(tmp_path / "corpus.jsonl", make_texts(1500))}'
    result = run(CONCURRENT, str(tmp_path / 'cache'), source, str(tmp_path))
    assert result.returncode == 0, result.stderr
    lines = [line for process in range(4) for line in json.loads((tmp_path / f'{process}.json').read_text())]
    assert sum('documents/s' in line for line in lines) == 1
    assert sum(line.startswith('tokenizer: ') for line in lines) == 1
    assert sum('already prepared' in line for line in lines) == 3
    assert len(contents(tmp_path / 'cache')) == 2
