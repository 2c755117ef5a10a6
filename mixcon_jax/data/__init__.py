"""Text to batches: sources, tokenizers, token stores, and packed, sharded, resumable batches."""

from mixcon_jax.data.dataset import Dataset, open_dataset
from mixcon_jax.data.loader import HeldoutBatches, TrainBatches, heldout_from_texts
from mixcon_jax.data.packing import Share
from mixcon_jax.data.prepare import prepare
from mixcon_jax.data.prepared import PreparedStore, baselines, require_tokenizer
from mixcon_jax.data.sources import open_source
from mixcon_jax.data.store import TokenStore
from mixcon_jax.data.tokenizer import Tokenizer

__all__ = [
    'Dataset',
    'HeldoutBatches',
    'PreparedStore',
    'Share',
    'TokenStore',
    'Tokenizer',
    'TrainBatches',
    'baselines',
    'heldout_from_texts',
    'open_dataset',
    'open_source',
    'prepare',
    'require_tokenizer',
]
