"""The grouped matrix product's one entry point: checks shapes and picks an implementation."""

from jaxtyping import Array, Float, Int

from kernels_pallas.call import sizes
from kernels_pallas.dispatch import Candidate, choose
from kernels_pallas.grouped_matmul import mosaic_gpu, reference, xla

WORDS = {'m': 'rows', 'd': 'width', 'e': 'groups', 'f': 'columns'}


def grouped_matmul(
    x: Float[Array, 'm d'],
    w: Float[Array, 'e d f'],
    group_sizes: Int[Array, ' e'],
    *,
    block: int | None = None,
    implementation: str | None = None,
) -> Float[Array, 'm f']:
    """Multiplies each group of consecutive rows by its own matrix.

    Args:
      x: `[M, D]` rows, group after group.
      w: `[E, D, F]`, one matrix a group.
      group_sizes: `[E]` rows of each group; their sum is at most M, and the rows after it give zeros.
      block: rows of one dense product of ``'blocked'``; at most ``block`` rows a group are wasted. None for what suits
        the platform, the rows a group and their type.
      implementation: None picks for the platform: ``'mosaic_gpu'`` (bfloat16) on NVIDIA GPUs of compute capability 9.x
        that have verified it, ``'blocked'`` elsewhere. ``'reference'`` is every group on every row.

    Returns:
      `[M, F]` in x's dtype, accumulated in at least float32.

    Raises:
      ValueError: a shape that does not fit, naming the argument, a block below 1, an implementation that does not
        exist, or one that cannot run here.
    """
    sizes(grouped_matmul, locals(), WORDS)
    if block is not None and block < 1:
        raise ValueError(f'grouped_matmul: block must be at least 1, got {block}')
    rows = x.shape[0]
    block = xla.block_rows(rows, w.shape[0], x.dtype) if block is None else min(block, max(rows, 1))
    candidates = (
        Candidate(
            'mosaic_gpu',
            lambda: mosaic_gpu.grouped_matmul(x, w, group_sizes),
            lambda: mosaic_gpu.unsupported(x, w),
            mosaic_gpu.variants,
        ),
        Candidate('blocked', lambda: xla.grouped_matmul(x, w, group_sizes, block)),
        Candidate('reference', lambda: reference.grouped_matmul(x, w, group_sizes), by_name=True),
    )
    return choose('grouped_matmul', implementation, candidates).run()
