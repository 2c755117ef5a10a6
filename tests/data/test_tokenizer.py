"""Tokenizers: any text round-trips, digits stand alone, training is deterministic, streams add up to the whole."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcon_jax.data import tokenizer as tokenizer_lib
from mixcon_jax.data.documents import Placed
from mixcon_jax.data.statistics import RoundTrip
from mixcon_jax.data.tokenizer import WORD, Tokenizer, bounded_words, came_back, load, split_long, train
from mixcon_jax.errors import UserError
from tests.data.cases import make_texts

TOKENIZER = train(make_texts(60), 400)
TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=60)


@settings(deadline=None)
@given(TEXT)
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize('text', ['<|endoftext|>', 'a<|endoftext|>b', '\0', '\r\n\t  ', '١٢٣ ½ 1234567890', '', '🏳️‍🌈'])
def test_awkward_texts_round_trip_without_special_tokens(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and TOKENIZER.eot_id not in ids


def test_every_digit_is_a_token():
    ids = TOKENIZER.encode('007 12x345')
    assert [TOKENIZER.decode([i]) for i in ids if TOKENIZER.decode([i]).strip().isdigit()] == list('00712345')


def test_training_is_deterministic_and_sized():
    again = train(make_texts(60), 400)
    assert again.fingerprint == TOKENIZER.fingerprint
    assert TOKENIZER.eot_id == 0 and 257 < TOKENIZER.vocab_size <= 400
    assert train(make_texts(60, seed=1), 400).fingerprint != TOKENIZER.fingerprint
    smallest = train(['abc'], 257)
    assert smallest.vocab_size == 257 and smallest.decode(smallest.encode('é∑')) == 'é∑'
    with pytest.raises(UserError, match='tokenizer_vocab_size: 256 is too few'):
        train(['abc'], 256)


def test_batches_equal_single_texts():
    texts = ['', *make_texts(20), '']
    batch = TOKENIZER.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [TOKENIZER.encode(text) for text in texts]
    assert {ids.dtype for ids in batch} == {np.dtype(np.uint16)}


@settings(deadline=None)
@given(st.text('ab \n', max_size=80), st.integers(1, 9))
def test_long_texts_are_cut_without_loss(text, limit):
    pieces = list(split_long(text, limit))
    assert ''.join(pieces) == text and all(len(piece) <= limit for piece in pieces)


def test_long_texts_encode_in_pieces(monkeypatch):
    text = '\n'.join(make_texts(50))
    whole = TOKENIZER.encode(text)
    monkeypatch.setattr(tokenizer_lib, 'PIECE', 100)
    pieces = TOKENIZER.encode(text)
    assert TOKENIZER.decode(pieces) == text and len(pieces) < len(whole) * 1.1


def test_only_a_piece_at_once_is_decoded_again(monkeypatch):
    """Of a long document: decoding takes dozens of bytes for a byte of text."""
    monkeypatch.setattr(tokenizer_lib, 'PIECE', 100)
    text, sizes, measure = '\n'.join(make_texts(50)), [], Tokenizer.round_trip

    def watched(self, pieces):
        sizes.append(sum(len(piece.text) for piece in pieces))
        return measure(self, pieces)

    monkeypatch.setattr(Tokenizer, 'round_trip', watched)
    expected = TOKENIZER.encode(text)
    for heldout in (True, False):
        sizes.clear()
        round_trip = RoundTrip(TOKENIZER)
        [ids] = round_trip.encode([Placed(text, text.encode(), heldout)])
        assert ids.tolist() == expected and set(round_trip.record().values()) == {1.0}
        assert sum(sizes) == len(text) and max(sizes) <= 300
    # Of training text no more than is asked for, inside a document too.
    sizes.clear()
    monkeypatch.setattr('mixcon_jax.data.statistics.SAMPLE', 500)
    RoundTrip(TOKENIZER).encode([Placed(text, text.encode(), heldout=False)])
    assert len(text) > 2000 and 300 < sum(sizes) < 900


@pytest.mark.parametrize('scheme', ['first', 'always'])
def test_where_long_documents_are_cut_loses_nothing(monkeypatch, scheme):
    """Also with tokenizers that begin every text with a space of their own."""
    monkeypatch.setattr(tokenizer_lib, 'PIECE', 100)
    vocab = {token: i for i, token in enumerate(['</s>', '▁', *'abc\n'])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    draw = random.Random(7)
    for letters in ('abc \n', 'abc ', 'a  '):
        text = 'a' + ''.join(draw.choices(letters, k=2000))
        round_trip = RoundTrip(Tokenizer(backend))
        round_trip.encode([Placed(text, text.encode(), heldout=True)])
        assert round_trip.record()['heldout'] == 1


def test_save_and_load(tmp_path):
    path = tmp_path / 'tokenizer.json'
    TOKENIZER.save(path)
    loaded = load(path)
    assert loaded.fingerprint == TOKENIZER.fingerprint == load(tmp_path).fingerprint
    assert loaded.encode('state 12 é <|endoftext|>') == TOKENIZER.encode('state 12 é <|endoftext|>')
    assert [path.name for path in tmp_path.iterdir()] == ['tokenizer.json']
    canonical = json.dumps(json.loads(path.read_text()), sort_keys=True)
    assert TOKENIZER.fingerprint == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize('eot', ['</s>', '<eos>', '<|end_of_text|>'])
def test_other_end_of_text_tokens(tmp_path, eot):
    vocab = {'<unk>': 0, 'a': 1, 'b': 2, eot: 9}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='<unk>'))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens([eot])
    backend.enable_truncation(2)
    backend.enable_padding(length=7)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=f'$A {eot}', special_tokens=[(eot, 9)])
    backend.save(str(tmp_path / 't.json'))
    loaded = load(tmp_path / 't.json')
    assert loaded.eot_id == 9 and loaded.eot == eot and loaded.vocab_size == 10
    assert loaded.encode('a b a b') == [1, 2, 1, 2]  # neither cut, padded nor ended


def test_bad_tokenizers_are_refused_in_one_line(tmp_path):
    (tmp_path / 'a.json').write_text('{"model": 3}')
    (tmp_path / 'b.json').write_text('{"trunc')
    (tmp_path / 'c.json').write_bytes(b'\xff\xfe')
    tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0})).save(str(tmp_path / 'd.json'))
    cases = {
        'a.json': 'not a tokenizer.json', 'b.json': 'not a tokenizer.json', 'c.json': 'not UTF-8',
        'd.json': 'no end-of-text token; add one of <|endoftext|>', 'e.json': 'No such file',
    }  # fmt: skip
    for name, words in cases.items():
        with pytest.raises(UserError) as error:
            load(tmp_path / name)
        assert words in str(error.value) and name in str(error.value) and '\n' not in str(error.value)


def test_wide_vocabularies_take_wide_tokens():
    vocab = {'</s>': 0, 'a': 1, 'z': 65536}
    wide = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='a')))
    assert wide.dtype == np.uint32 and wide.encode_batch(['z'])[0].tolist() == [65536]


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_streams_add_up_to_the_whole(ids):
    """Also of token sequences that are no text: broken characters, end-of-text in the middle."""
    stream = TOKENIZER.stream()
    assert ''.join([*map(stream.push, ids), stream.flush()]) == TOKENIZER.decode(ids, skip_special=True)


@settings(deadline=None)
@given(TEXT)
def test_streams_show_characters_once_complete(text):
    stream, shown = TOKENIZER.stream(), ''
    for count, token in enumerate(TOKENIZER.encode(text), 1):
        shown += stream.push(token)
        complete = TOKENIZER._backend.decode(TOKENIZER.encode(text)[:count])
        assert shown == complete or shown == complete.removesuffix('\ufffd')
    assert shown + stream.flush() == text


def test_streams_of_word_tokenizers_keep_spaces():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({'▁a': 0, '▁b': 1, '</s>': 2, '▁': 3, 'a': 4, 'b': 5}, []))
    backend.decoder = tokenizers.decoders.Metaspace()
    stream = Tokenizer(backend).stream()
    assert [stream.push(token) for token in (0, 1, 0, 0)] == ['a', ' b', ' a', ' a']
    stream = Tokenizer(backend).stream(after=[1])  # a prompt
    assert [stream.push(token) for token in (0, 1)] == [' a', ' b']
    backend.add_special_tokens(['</s>'])
    stream = Tokenizer(backend).stream()
    assert [stream.push(token) for token in (0, 2, 1)] == ['a', '', ' b']  # also behind what is not shown


def test_streams_of_bytes_show_characters_once_complete():
    """Of a decoder that gives a mark for each byte of a run that is no text yet; a prompt may end in such a run."""
    vocabulary = {f'<0x{byte:02X}>': byte for byte in range(256)} | {'</s>': 256, '▁a': 257}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace('▁', ' '), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
    ])  # fmt: skip
    text = '漢字仮名' * 6
    for prompt in ('', 'é漢' * 30):
        stream = Tokenizer(backend).stream(after=list(prompt.encode()))
        shown = [stream.push(token) for token in (*text.encode(), 257)]
        assert ''.join(shown) == text + ' a' and shown[2::3] == [*text], shown


PARTS = st.sampled_from(
    ['a', 'é', '漢', '_', '!', ' ', '\n', '\t', '\x1c', '\x85', '\u3000', '7', '́', '🙂', "'s", ' \t', 'a\x1c']
)


@settings(deadline=None)
@given(st.lists(st.tuples(PARTS, st.sampled_from([1, 2, 255, 256, 257, 700])), max_size=6))
def test_no_word_that_training_sees_is_longer_than_the_bound(runs):
    text = ''.join(part * count for part, count in runs)
    pieces = list(bounded_words(text))
    assert ''.join(pieces) == text and all(pieces)
    before = TOKENIZER._backend.pre_tokenizer
    assert all(end - start <= WORD + 1 for piece in pieces for _, (start, end) in before.pre_tokenize_str(piece))


def test_ordinary_text_is_not_cut():
    for text in ['', *make_texts(30), 'x' * (WORD - 1) + '\n' + 'y' * (WORD - 1), 'a' + ' ' * (WORD - 1) + 'b']:
        assert list(bounded_words(text)) == [text] * bool(text)


def test_training_on_text_without_spaces_takes_time_in_proportion_to_it():
    dna = ''.join(random.Random(2).choices('ACGT', k=1_000_000))
    begin = time.monotonic()
    trained = train([dna], 600)  # unbounded, minutes
    assert time.monotonic() - begin < 20
    assert trained.vocab_size == 600 and trained.decode(trained.encode(dna)) == dna


INTERRUPTED = """
import random, sys, time
from mixcon_jax.data.tokenizer import train
said = []
def still(seconds):
    print('still', flush=True)
print('begin', flush=True)
train([''.join(random.choices('ACGT', k=4_000_000))], 8000, still)
"""


def test_training_is_interrupted_within_two_seconds():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {'PYTHONPATH': root}
    process = subprocess.Popen(
        [sys.executable, '-c', INTERRUPTED], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert [process.stdout.readline() for _ in range(2)] == ['begin\n', 'still\n']  # in the library, and it says so
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 2.5 and err.splitlines()[-1] == 'KeyboardInterrupt', err


def test_encoding_stops_when_asked(monkeypatch):
    monkeypatch.setattr(tokenizer_lib, 'GROUP', 0)  # ask before every piece
    texts = make_texts(5)
    asked = iter([False, False, True])
    got = TOKENIZER.encode_batch(texts, lambda: next(asked))
    assert [len(ids) > 0 for ids in got] == [True, True, False, False, False]


@settings(deadline=None)
@given(TEXT, TEXT)
def test_what_comes_back_is_all_only_of_equal_texts(text, other):
    size = len(text.encode())
    assert came_back(text, text) == size
    assert text == other or 0 <= came_back(text, other) < max(size, 1)
    assert came_back('a bb\nccc', 'a [UNK] ccc') == 5  # two words, and the space that there still is once


def back(tokenizer: Tokenizer, texts: list[str]) -> int:
    """How many bytes come back."""
    counts: list[int] = []
    tokenizer.encode_batch(texts, seen=lambda pieces: counts.append(tokenizer.round_trip(pieces)))
    return sum(counts)


def word_tokenizer(words: str, **options) -> Tokenizer:
    vocab = {word: i for i, word in enumerate(['</s>', '[UNK]', *words.split()])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '[UNK]'))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend)


def test_tokenizers_that_lose_text_are_told_from_those_that_cannot():
    assert TOKENIZER.lossless
    texts = make_texts(20)
    assert back(TOKENIZER, texts) == sum(len(text.encode()) for text in texts)
    lossy = word_tokenizer('the state of')
    assert not lossy.lossless
    assert back(lossy, ['the state of gains']) < 18
    # A normaliser loses what the vocabulary would keep.
    record = json.loads(TOKENIZER.to_json())
    for change in (
        {'normalizer': {'type': 'Lowercase'}},
        {'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}},
        {'decoder': None},
    ):
        assert not tokenizer_lib.from_json(json.dumps(record | change)).lossless
