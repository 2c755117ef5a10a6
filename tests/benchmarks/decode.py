"""Decoding one token after a long context: tokens/s and bytes of state, `python -m tests.benchmarks.decode`.

Every architecture has as many parameters. The context is really read first, so that caches are full. With `--experts`
one sequence of a published model with experts is decoded instead, by each form of its experts' products that fits.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax.models import accounting, decoder
from mixcon_jax.models.accounting import parameter_count
from mixcon_jax.models.context import Context
from mixcon_jax.models.presets import MOE_MAMBA, moe_mamba
from tests.benchmarks.train_step import BASELINE, PATTERNS, experiment

STEPS = 64  # tokens a turn


def decoding(model_config, batch: int, context_length: int) -> Callable[[], float]:
    """Reads a context of random tokens; returns a function that decodes STEPS tokens from there and times it."""
    model = decoder.create(model_config)
    graphdef, variables = nnx.split(model)

    def forward(variables, tokens, context, state):
        model = nnx.merge(graphdef, variables)
        hidden, state, _ = model(tokens, context, state)
        return jnp.argmax(model.logits(hidden[:, -1:]), -1).astype(jnp.int32), state

    # As in mixcon_jax.inference.generate: a call a token, whose state's buffers are reused.
    @functools.partial(jax.jit, donate_argnums=3)
    def step(variables, token, position, state):
        one = jnp.ones((batch, 1), jnp.int32)
        return forward(variables, token, Context(segment_ids=one, positions=one * position), state)

    tokens = jax.random.randint(jax.random.key(0), (batch, context_length), 0, model_config.vocab_size)
    state = model.init_state(batch, context_length + STEPS)
    token, filled = jax.jit(forward)(variables, tokens, Context.whole(batch, context_length), state)

    def decode() -> float:
        next_token, state = token, jax.tree.map(jnp.copy, filled)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for i in range(STEPS):
            next_token, state = step(variables, next_token, jnp.int32(context_length + i), state)
        jax.block_until_ready(next_token)
        return time.perf_counter() - start

    return decode


def best_of(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Seconds of the best of some turns each, which take turns; one more, the first, compiles."""
    best = dict.fromkeys(runs, float('inf'))
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            seconds = run()
            best[name] = min(best[name], seconds) if repeat else best[name]
    return best


def experts(size: str, repeats: int) -> None:
    """Every expert on every token, as decoding was, against a token's own experts alone."""
    runs = {}
    for form in ('dense', 'single'):
        config = configs.default()
        config.model.update(moe_mamba(size))
        config.model.moe.implementation = form
        runs[form] = decoding(configs.validate(config).model, 1, 16)
    print(f'{size}, {config.model.moe.num_experts} experts, one sequence')
    best = best_of(runs, repeats)
    for form, seconds in best.items():
        print(f'{form:12}{STEPS / seconds:10.1f} tokens/s{best["dense"] / seconds:8.2f}x')


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--dim', type=int, default=64)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--contexts', type=int, nargs='+', default=[512, 8192])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--experts', metavar='SIZE', choices=MOE_MAMBA, help='one of %(choices)s')
    args = parser.parse_args(arguments)
    if args.experts:
        experts(args.experts, args.repeats)
        return
    total = parameter_count(experiment(PATTERNS['MixCon 2:6'], args.dim, args.batch, 512).model).total
    configs = {name: experiment(pattern, args.dim, args.batch, 512, total) for name, pattern in PATTERNS.items()}
    for context in args.contexts:
        runs = {name: decoding(config.model, args.batch, context) for name, config in configs.items()}
        best = best_of(runs, args.repeats)
        print(f'{args.batch} sequences after a context of {context} tokens, dim {args.dim}, {total:,} parameters')
        print(f'{"":12}{"tokens/s":>10}{"speed":>8}{"state bytes":>14}{"share":>8}')
        bytes_of = {name: accounting.state_bytes(config.model, context) for name, config in configs.items()}
        for name in runs:
            print(
                f'{name:12}{args.batch * STEPS / best[name]:10.0f}{best[BASELINE] / best[name]:7.2f}x'
                f'{bytes_of[name]:14,}{bytes_of[name] / bytes_of[BASELINE]:8.3f}'
            )


if __name__ == '__main__':
    main(sys.argv[1:])
