"""Blockwise attention against dense, both ways, and one query to a cache: `python -m tests.benchmarks.attention`."""

import argparse
import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.attention import attention
from tests.benchmarks.timing import compare, table

BASELINE = 'dense'


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {'batch': 1, 'length': 2048, 'heads': 8, 'kv_heads': 2, 'width': 64, 'keys': 8192, 'repeats': 5}
    for name, value in sizes.items():
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args(arguments)
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (args.heads, args.kv_heads, args.kv_heads)
    qkv = tuple(jax.random.normal(key, (args.batch, args.length, n, args.width)) for key, n in zip(keys, heads))

    def gradient(**options):
        return jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(attention(*qkv, **options))), argnums=(0, 1, 2))

    cases = {BASELINE: (gradient(implementation='reference'), qkv)}
    for block_size in (64, 128, 256, 512):
        cases[f'blockwise, block_size={block_size}'] = (gradient(block_size=block_size), qkv)
    print('attention, forward + backward:', ', '.join(f'{name} {getattr(args, name)}' for name in sizes))
    print(table(compare(cases, args.repeats), BASELINE))

    cache = (jax.random.normal(key, (args.batch, args.keys, args.kv_heads, args.width)) for key in keys[1:])
    one = qkv[0][:, -1:], *cache
    last = functools.partial(attention, q_offset=args.keys - 1)
    forms = {BASELINE: 'reference', 'blockwise': 'blockwise', 'one query': 'one_query'}
    cases = {name: (functools.partial(last, implementation=form), one) for name, form in forms.items()}
    print(f'\none query to {args.keys} keys, forward')
    print(table(compare(cases, 10 * args.repeats), BASELINE))


if __name__ == '__main__':
    main(sys.argv[1:])
