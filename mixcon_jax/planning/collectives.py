"""What devices send one another in a compiled module: collectives, counted with their bytes."""

import re

from mixcon_jax.planning.hlo import array_bytes, kernels

COLLECTIVES = ('collective-permute', 'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all')


def collectives(module: str) -> dict[str, tuple[int, int]]:
    """``{kind: (number, bytes)}`` of an optimised module's text, loops followed."""
    found = dict.fromkeys(COLLECTIVES, (0, 0))
    for kernel in kernels(module):
        kind = re.sub('-start$', '', kernel.kind)
        if kind in found:
            size = sum(map(array_bytes, kernel.operands))
            if kind != 'all-to-all':  # gives as much as it takes, and what starts one is both
                size = max(array_bytes(kernel.shape), size)
            number, total = found[kind]
            found[kind] = number + kernel.count, total + kernel.count * size
    return found


def of_sequence(found: dict[str, tuple[int, int]]) -> int:
    """Bytes of all collectives but the sums, which are over parameters' gradients and statistics."""
    return sum(size for kind, (_, size) in found.items() if kind != 'all-reduce')
