"""Tokens a second of the data pipeline against what the quickstart's train step takes, in the same run.

Rows are packed, batched and read ahead, from memory and from disk. The pipeline must give ten times what a step takes,
or the accelerator waits for text.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from mixcon_jax import config as config_lib
from mixcon_jax import step
from mixcon_jax.data import TokenStore, TrainBatches
from mixcon_jax.data.store_writer import StoreWriter
from mixcon_jax.parallel.mesh import make_mesh
from tests.data.cases import METADATA

TOKENS = 4_000_000


def make_store(path: Path, mean_length: int, seed: int = 0) -> None:
    """Writes a store of random tokens in documents of geometrically distributed lengths."""
    draw = np.random.default_rng(seed)
    writer = StoreWriter(path, np.dtype(np.uint16))
    while writer.num_tokens < TOKENS:
        length = int(draw.geometric(1 / mean_length))
        writer.add(draw.integers(1, 2048, length, np.uint16), 4 * length, False)
    writer.finish(METADATA | {'tokenizer': 'benchmark', 'eot_id': 0})


def tokens_per_second(
    store: TokenStore, seq_len: int = 256, batch_size: int = 4, seconds: float = 2.0, num_threads: int = 2
) -> float:
    """Tokens a second that ``TrainBatches`` yields, after the first batch."""
    config = config_lib.default()
    config.data.seq_len, config.train.batch_size, config.data.num_threads = seq_len, batch_size, num_threads
    batches = TrainBatches(config, [store]).iterate()
    next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        count += next(batches)['tokens'].size
    rate = count / (time.perf_counter() - begin)
    batches.close()
    return rate


def step_tokens_per_second(steps: int = 8) -> float:
    """Tokens a second that the quickstart's train step takes here: the fastest of a few steps."""
    config = config_lib.validate(config_lib.load('experiments/quickstart.py'))
    compiled = step.make_steps(config, make_mesh(config.mesh, jax.devices()[:1]))
    shape = (config.train.batch_size, config.data.seq_len)
    batch = {key: np.ones(shape, np.int32) for key in step.BATCH_KEYS}
    batch['loss_mask'], batch['positions'] = (
        np.ones(shape, bool),
        np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    )
    state, seconds = compiled.init_state(), []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        state, metrics = compiled.train_step(state, compiled.put(batch))
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)
    return shape[0] * shape[1] / min(seconds[1:])


def main() -> None:
    need = step_tokens_per_second()
    print(f"the quickstart's train step takes {need:,.0f} tokens/s; the pipeline gives")
    slowest = float('inf')
    print(f'{"documents":>12} {"T":>6} {"rows":>5} {"memory tok/s":>14} {"disk tok/s":>14}')
    with tempfile.TemporaryDirectory() as folder:
        for mean_length in (200, 6000):
            path = Path(folder, str(mean_length))
            make_store(path, mean_length)
            stores = [TokenStore.open(path, 'train', memory_limit=limit) for limit in (1 << 28, 0)]
            for seq_len, batch_size in ((256, 4), (4096, 8)):
                memory, disk = (tokens_per_second(store, seq_len, batch_size) for store in stores)
                print(f'{mean_length:>8} tok {seq_len:>6} {batch_size:>5} {memory:>14,.0f} {disk:>14,.0f}', flush=True)
                slowest = min(slowest, memory, disk)
    ratio = slowest / need
    print(f'slowest of these: {ratio:.0f} times the need (target 10): {"met" if ratio >= 10 else "MISSED"}')


if __name__ == '__main__':
    main()
