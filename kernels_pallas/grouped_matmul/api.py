"""The grouped matrix product's one entry point: checks shapes and picks an implementation."""

from jaxtyping import Array, Float, Int

from kernels_pallas.call import sizes
from kernels_pallas.dispatch import Candidate, choose
from kernels_pallas.grouped_matmul import reference, xla

WORDS = {'m': 'rows', 'd': 'width', 'e': 'groups', 'f': 'columns'}


def grouped_matmul(
    x: Float[Array, 'm d'],
    w: Float[Array, 'e d f'],
    group_sizes: Int[Array, ' e'],
    *,
    block: int = 128,
    implementation: str | None = None,
) -> Float[Array, 'm f']:
    """Multiplies each group of consecutive rows by its own matrix.

    Args:
      x: `[M, D]` rows, group after group.
      w: `[E, D, F]`, one matrix a group.
      group_sizes: `[E]` rows of each group; their sum is at most M, and the rows after it give zeros.
      block: rows of one dense product; at most ``block`` rows a group are wasted.
      implementation: ``'reference'`` (every group on every row), ``'blocked'``, or None for the best here.

    Returns:
      `[M, F]` in x's dtype, accumulated in at least float32.

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist.
    """
    sizes(grouped_matmul, locals(), WORDS)
    candidates = (
        Candidate('blocked', lambda: xla.grouped_matmul(x, w, group_sizes, min(block, max(x.shape[0], 1)))),
        Candidate('reference', lambda: reference.grouped_matmul(x, w, group_sizes), by_name=True),
    )
    return choose('grouped_matmul', implementation, candidates).run()
