"""A small corpus and a configuration that reads it."""

from collections.abc import Callable
from pathlib import Path

import ml_collections
import pytest

from mixcon_jax import config as config_lib
from tests.data.cases import make_texts, write_jsonl


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., ml_collections.ConfigDict]:
    """Builds a configuration whose ``data`` options are given; its cache lies in ``tmp_path``."""

    def make(*sources: str, batch_size: int = 4, seed: int = 0, **options) -> ml_collections.ConfigDict:
        config = config_lib.default()
        config.seed, config.train.batch_size = seed, batch_size
        small = {
            'cache_dir': str(tmp_path / 'cache'),
            'tokenizer_vocab_size': 300,
            'seq_len': 16,
            'heldout_fraction': 0.2,
        }
        for key, value in {**small, **options, 'sources': sources}.items():
            config.data[key] = value
        return config

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[list[str], str]:
    """Texts, and the source that yields them."""
    texts = make_texts(40)
    return texts, f'files:{write_jsonl(tmp_path / "corpus.jsonl", texts)}'
