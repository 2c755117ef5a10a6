"""Peak memory of a layer of every mixer on a GPU that is not there: `python -m tests.benchmarks.mixer_memory`.

Forward and backward pass of one row in bfloat16, compiled as a GPU of that kind would choose by default, portable forms
where it has no kernels, at the lengths of a doubling: memory that is linear doubles at most. JAX_PLATFORMS=cpu, extra
`plan`; nothing runs. `scan_memory` has longer rows, by implementation of the scan.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

from mixcon_jax.models import kinds
from tests.benchmarks.scan_memory import MIB, peaks

LENGTHS = (4096, 8192, 16384)


def growth(sizes: Sequence[int]) -> list[float]:
    """How much more memory each length takes than the one before; of linear memory 2, less what no length changes."""
    return [after / before for before, after in itertools.pairwise(sizes)]


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--dim', type=int, default=512)
    parser.add_argument('--mixers', nargs='+', choices=kinds.names('mixer'), default=kinds.names('mixer'))
    parser.add_argument('--target', default='h100')
    args = parser.parse_args(arguments)
    print(f'| mixer | {" | ".join(f"T {length:,}: MiB" for length in LENGTHS)} | growth |')
    print('|---' + '|---:' * (len(LENGTHS) + 1) + '|')
    for mixer in args.mixers:
        sizes = peaks(mixer, 'default', LENGTHS, args.dim, args.target)
        cells = [f'`{mixer}`', *(f'{size / MIB:.1f}' for size in sizes), ', '.join(f'{x:.2f}' for x in growth(sizes))]
        print(f'| {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
