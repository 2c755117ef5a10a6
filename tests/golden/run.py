"""The golden run: `python -m tests.golden.run` writes its losses anew, after a change that is meant to move them."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from mixcon_jax.runs.records import read
from mixcon_jax.train import train
from tests.tiny import WORDS, tiny_config

FOLDER = Path(__file__).parent
CORPUS, LOSSES = FOLDER / 'corpus.jsonl', FOLDER / 'losses.json'


def losses(folder: Path) -> dict[str, list[float]]:
    """Trains on the committed text; returns the loss of every step and of every held-out evaluation."""
    (folder / 'corpus').mkdir(parents=True)  # keeps tiny_config from writing one
    config = tiny_config(folder, train__steps=40, eval__every=20, checkpoint__every=1000)
    config.data.sources = (f'files:{CORPUS}',)
    result = train(config, folder / 'run')
    assert result.exit_code == 0
    records = list(read(folder / 'run' / 'metrics.jsonl'))
    return {
        kind: [record['loss'] for record in records if record['kind'] == kind] for kind in ('train', 'eval', 'final')
    }


def write_corpus() -> None:
    """Writes the synthetic text: a Markov chain over a few words, so that there is something to learn."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(len(WORDS), 0.2), size=len(WORDS))
    with CORPUS.open('w') as file:
        for _ in range(80):
            word, words = 0, []
            for _ in range(int(rng.integers(5, 100))):
                word = rng.choice(len(WORDS), p=chain[word])
                words.append(WORDS[word])
            file.write(json.dumps({'text': ' '.join(words) + '.\n'}) + '\n')


if __name__ == '__main__':
    if not CORPUS.exists():
        write_corpus()
    with tempfile.TemporaryDirectory() as folder:
        LOSSES.write_text(json.dumps(losses(Path(folder)), indent=1) + '\n')
    print(f'wrote {LOSSES}', file=sys.stderr)
