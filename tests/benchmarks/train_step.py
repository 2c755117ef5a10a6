"""A MixCon train step against pure attention with as many parameters: `python -m tests.benchmarks.train_step`.

The same tokens a step at both lengths: attention's share grows with the length, the scan's does not.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np

from mixcon_jax import config as configs
from mixcon_jax.models.accounting import flops_per_token, parameter_count, width_for
from mixcon_jax.models.presets import hybrid
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.step import BATCH_KEYS, make_steps
from tests.benchmarks.timing import compare, table

BASELINE = 'attention'
PATTERNS = {
    BASELINE: hybrid(8, 0),
    'MixCon 2:6': hybrid(2, 6),
    'Conba': hybrid(0, 8),
    'Mamba': hybrid(0, 8, mixer='mamba'),
}  # fmt: skip


def experiment(
    pattern: tuple[str, ...], dim: int, batch: int, length: int, total: int = 0
) -> ml_collections.ConfigDict:
    """Eight layers without experts; given ``total``, the MLP's width is chosen to have so many parameters."""
    config = configs.default()
    model = config.model
    model.dim, model.vocab_size, model.tie_embeddings, model.pattern = dim, 512, True, pattern
    if total:
        model.mlp.hidden_dim = width_for(model, total)
    config.data.seq_len, config.train.batch_size, config.train.loss_chunk = length, batch, 512
    return configs.validate(config)


def train_step(config: ml_collections.ConfigDict) -> tuple[Callable, tuple]:
    """The step, and its state and a batch of random tokens."""
    steps = make_steps(config, make_mesh(config.mesh))
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, 512, shape).astype(np.int32)
    values = (tokens, np.roll(tokens, -1, 1), np.ones(shape, bool), np.ones(shape, np.int32))
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = dict(zip(BATCH_KEYS, (*values, positions), strict=True))
    # Not donated: every repeat starts from the same state.
    return steps.train_step.__wrapped__, (steps.init_state(), steps.put(batch))


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--dim', type=int, default=64)
    parser.add_argument('--tokens', type=int, default=4096, help='tokens a step')
    parser.add_argument('--lengths', type=int, nargs='+', default=[512, 4096])
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args(arguments)
    for length in args.lengths:
        batch = args.tokens // length
        total = parameter_count(experiment(PATTERNS['MixCon 2:6'], args.dim, batch, length).model).total
        cases = {name: experiment(pattern, args.dim, batch, length, total) for name, pattern in PATTERNS.items()}
        print(f'one train step of {batch} x {length} tokens, dim {args.dim}, {total:,} parameters within 1 %')
        for config in cases.values():
            assert abs(parameter_count(config.model).total / total - 1) < 0.01
        timings = compare({name: train_step(config) for name, config in cases.items()}, args.repeats)
        print(table(timings, BASELINE))
        for name, timing in timings.items():
            ratio = timing.best / timings[BASELINE].best
            work = flops_per_token(cases[name].model, length) / flops_per_token(cases[BASELINE].model, length)
            print(f'{name:12} {ratio:.2f} times the time of {BASELINE}, {work:.2f} times its operations')


if __name__ == '__main__':
    main(sys.argv[1:])
