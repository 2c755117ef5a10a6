"""The grouped product by tokamax's ragged dot for Hopper GPUs (Pallas Mosaic): an adapter to its private interface.

Its kernels leave rows after the last group as they find them, in the product and in the gradient of x; here they are
zeros, as everywhere. Matrices are read by expert where they lie, and a group's tiles reach beyond it at both ends.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tokamax as library

MODULE = 'tokamax._src.ops.ragged_dot.pallas_mosaic_gpu'
# What the library takes by itself: tiles of `block_m` rows by `block_n` columns, `block_k` of what is summed at once; a
# block a tile, not a multiprocessor, so that several share one.
BLOCKS = {'block_m': 64, 'block_n': 64, 'block_k': 128, 'num_stages': 2, 'split_k': 1, 'persistent': False}
TILE = 64  # of rows and columns: a matrix of others would be written beyond its end, and rows are padded


def unsupported(x: Any, w: Any) -> str | None:
    """Why this cannot take a call on the device that is here, or None: of arrays, or of their shapes."""
    for name, value in (('x', x), ('w', w)):
        if value.dtype != jnp.bfloat16:
            return f'it takes bfloat16, {name} is {value.dtype.name}'
    if not x.shape[0] or not w.shape[0] or any(not size or size % TILE for size in w.shape[1:]):
        return f'it takes rows, and matrices whose sides are multiples of {TILE}; x is {x.shape}, w {w.shape}'
    rows = padded(x.shape[0])
    for name, shape in (('x', (rows, x.shape[1])), ('w', w.shape), ('the product', (rows, w.shape[2]))):
        if (reason := library.too_many(name, shape)) is not None:
            return reason
    return library.unavailable(MODULE)


def padded(rows: int) -> int:
    """A number of rows as the library is given it: of whole tiles."""
    return rows + -rows % TILE


def variants() -> tuple[str, ...]:
    """The programs that a call runs, by the names of their cards."""
    return ('bfloat16',)


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Arguments and result as in `api.grouped_matmul`.

    Args:
      x, w: [M, D] and [E, D, F], bfloat16, D and F multiples of `TILE`, any M.
      group_sizes: int [E].
    """
    rows, group_sizes = x.shape[0], group_sizes.astype(jnp.int32)
    real = (jnp.arange(rows) < jnp.sum(group_sizes))[:, None]
    # Where the select is on x, its gradient is cut off, too.
    tiles = jnp.pad(jnp.where(real, x, 0), ((0, padded(rows) - rows), (0, 0)))
    return jnp.where(real, _ragged_dot(tiles, w, group_sizes)[:rows], 0)


def _ragged_dot(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The library's kernels, with the tiles that it takes by itself; its own choice looks into a file of timings first.

    Args:
      x, w, group_sizes: as in `grouped_matmul`, M a multiple of `TILE`; rows after the last group may come back as
        anything, in the result and in the gradient of x.
    """
    from tokamax._src.ops.ragged_dot import base, pallas_mosaic_gpu, pallas_mosaic_gpu_common

    config = pallas_mosaic_gpu.Config(**BLOCKS, grid_minor_dim=pallas_mosaic_gpu_common.MatmulDimension.M)
    product = pallas_mosaic_gpu.PallasMosaicGpuRaggedDot(config=config)
    gradient = functools.partial(base.vjp, dlhs_ragged_dot=product, drhs_ragged_dot=product)
    return product.replace(vjp=gradient)(x, w, group_sizes=group_sizes)
