"""The grouped matrix product and its implementations."""

from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Candidate, choose
from kernels_pallas.grouped_matmul import reference, xla


def grouped_matmul(
    x: Float[Array, 'm d'],
    w: Float[Array, 'e i f'],
    group_sizes: Int[Array, 'g'],
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
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f'grouped_matmul: x {x.shape}, w {w.shape} and group_sizes {group_sizes.shape} must be'
            ' [M, D], [E, D, F] and [E]'
        )
    candidates = (
        Candidate('blocked', lambda: xla.grouped_matmul(x, w, group_sizes, min(block, max(x.shape[0], 1)))),
        Candidate('reference', lambda: reference.grouped_matmul(x, w, group_sizes), by_name=True),
    )
    return choose('grouped_matmul', implementation, candidates).run()
