"""Small configurations and batches for the tests of the training step."""

import jax
import numpy as np
from jax.sharding import Mesh

from mixcon_jax import config as configs
from mixcon_jax.parallel.mesh import make_mesh


def step_config(**options):
    """A whole configuration of a small model; options are dotted keys with ``__`` for the dot."""
    config = configs.default()
    config.model.update(dim=16, vocab_size=61, num_blocks=2, pattern=('attention+moe',), init_std=0.1)
    config.model.attention.update(num_heads=2, num_kv_heads=1)
    config.model.moe.update(num_experts=3, top_k=2, hidden_dim=8)
    config.model.mlp.hidden_dim = 24
    config.data.seq_len = 13
    config.train.update(batch_size=8, steps=20, loss_chunk=10)
    config.optim.update(warmup_steps=0, learning_rate=0.05)
    for key, value in options.items():
        configs.put(config, key.replace('__', '.'), value)
    return config


def mesh_of(config, devices: int = 1) -> Mesh:
    """The configuration's mesh over the first devices only."""
    return make_mesh(config.mesh, jax.devices()[:devices])


def random_batch(seed: int, rows: int, length: int, vocab: int = 61) -> dict[str, np.ndarray]:
    """Rows of unequal lengths, each of two documents but for the shortest; the last row is all padding."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(rows - 1):
        used = int(rng.integers(1, length + 1))
        cut = int(rng.integers(0, used))
        documents.append([cut, used - cut])
    return packed_batch(seed, [*documents, []], length, vocab)


def packed_batch(seed: int, documents: list[list[int]], length: int, vocab: int = 61) -> dict[str, np.ndarray]:
    """A row for each list of documents' lengths; what exceeds a row is cut off, what it lacks is padding."""
    rng = np.random.default_rng(seed)
    shape = (len(documents), length)
    batch = {key: rng.integers(0, vocab, shape).astype(np.int32) for key in ('tokens', 'targets')}
    batch |= {key: np.zeros(shape, np.int32) for key in ('segment_ids', 'positions')}
    for row, lengths in enumerate(documents):
        used = min(sum(lengths), length)
        batch['segment_ids'][row, :used] = np.repeat(1 + np.arange(len(lengths)), lengths)[:used]
        batch['positions'][row, :used] = np.concatenate([*map(np.arange, lengths), np.zeros(0, int)])[:used]
    batch['loss_mask'] = batch['segment_ids'] > 0
    return batch
