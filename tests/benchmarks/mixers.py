"""Every registered mixer against attention and Mamba, forward and backward: `python -m tests.benchmarks mixers`.

One layer of each, float32, its options at their defaults (Hyena's filter as long as the rows), and the same tokens at
every length. Parameters differ, so they stand beside the times.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import jax

from mixcon_jax.models import kinds
from tests.benchmarks.conba_layer import layer_gradient
from tests.benchmarks.timing import Timing, compare

BASELINES = ('attention', 'mamba')


def timed(mixers: Sequence[str], dim: int, tokens: int, length: int, repeats: int) -> dict[str, tuple[int, Timing]]:
    """Each mixer's parameters, and its time for ``tokens / length`` rows."""
    cases = {mixer: layer_gradient(mixer, {}, dim, tokens // length, length) for mixer in mixers}
    found = compare(cases, repeats)
    sizes = {mixer: sum(math.prod(x.shape) for x in jax.tree.leaves(args[0])) for mixer, (_, args) in cases.items()}
    return {mixer: (sizes[mixer], found[mixer]) for mixer in mixers}


def table(found: dict[int, dict[str, tuple[int, Timing]]]) -> str:
    """Markdown: milliseconds of each mixer at each length, and as multiples of the baselines'."""
    ratios = ' | '.join(f'{name} = 1' for name in BASELINES)
    lines = ['| mixer | parameters | ' + ' | '.join(f'T {length}: ms | {ratios}' for length in found) + ' |']
    lines.append('|---' + '|---:' * (1 + len(found) * (1 + len(BASELINES))) + '|')
    for mixer, (size, _) in next(iter(found.values())).items():
        cells = [f'`{mixer}`', f'{size:,}']
        for timings in found.values():
            best = timings[mixer][1].best
            cells += [f'{1e3 * best:.0f}', *(f'{best / timings[name][1].best:.2f}' for name in BASELINES)]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--dim', type=int, default=128)
    parser.add_argument('--tokens', type=int, default=4096)
    parser.add_argument('--lengths', type=int, nargs='+', default=[512, 4096])
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args(arguments)
    print(f'one layer, forward + backward, {args.tokens} tokens, dim {args.dim}')
    mixers = kinds.names('mixer')
    found = {length: timed(mixers, args.dim, args.tokens, length, args.repeats) for length in args.lengths}
    print(table(found))


if __name__ == '__main__':
    main(sys.argv[1:])
