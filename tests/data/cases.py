"""Small corpora for the tests of data, with digits, blank lines and characters of one to four bytes."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import tokenizers

WORDS = (
    'the state',
    'a',
    'gain',
    '12',
    '007',
    'é',
    '∑',
    '𝛼',
    'naïve',
    'def',
    '+= 3.14',
    '\n\n',
    '',
    '\t',
    'Straße',
    '漢字',
    '<|endoftext|>',
    '🙂',
)

# What a store's metadata.json must have, and StoreWriter does not know.
METADATA = {
    'tokenizer': 'f', 'eot_id': 3, 'vocab_size': 9, 'source': {'spec': 'stdlib', 'fingerprint': 'x'},
    'heldout_fraction': 0.3, 'split': 'hash', 'skipped': 0, 'round_trip': {'train': 1.0, 'heldout': 1.0},
    'baselines': {'train_bytes': [1] * 256, 'heldout_bytes': [1] * 256, 'gzip_in': 1, 'gzip_out': 1},
}  # fmt: skip


def make_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of one to ``longest`` words, all different."""
    draw = random.Random(seed)
    return [' '.join(draw.choices(WORDS, k=draw.randint(1, longest))) + f'\n#{seed}-{i}' for i in range(count)]


def write_jsonl(path: Path, texts: Sequence[str], field: str = 'text') -> Path:
    path.write_text(''.join(json.dumps({field: text, 'id': i}) + '\n' for i, text in enumerate(texts)))
    return path


def lossy_tokenizer(path: Path) -> str:
    vocab = {word: i for i, word in enumerate(['</s>', '[UNK]', 'the', 'state', 'a', 'gain'])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '[UNK]'))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(path))
    return str(path)
