"""Blocked form in plain XLA: each group's rows in blocks, each block one dense product with its group's matrix.

``jax.lax.ragged_dot`` becomes a dense product over all groups on CPU and CUDA; here at most (M + block E) / M of the
necessary products are computed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import platform

ROWS = 128  # of a block on a CPU, and the least elsewhere
LARGEST = 4096  # bytes of a block's column on a GPU, which takes few large products better: 2048 rows of bfloat16


def block_rows(rows: int, groups: int, dtype: jnp.dtype) -> int:
    """Rows of a block where the caller does not say.

    On a GPU the largest power of two that a group holds four times in the mean, so that at most a quarter of the rows
    is wasted, within `ROWS` and `LARGEST`; elsewhere `ROWS`.
    """
    rows = max(rows, 1)
    if platform.platform() != 'gpu':
        return min(ROWS, rows)
    most = min(rows // max(4 * groups, 1), LARGEST // dtype.itemsize)
    return min(max(ROWS, 1 << max(most, 1).bit_length() - 1), rows)


class _Plan(NamedTuple):
    """Block i multiplies ``rows[i]`` rows from ``start[i]`` by matrix ``group[i]``; ``used`` blocks do."""

    group: Int[Array, 'n']
    start: Int[Array, 'n']
    rows: Int[Array, 'n']
    used: Int[Array, '']


def _plan(group_sizes: Int[Array, 'e'], num_rows: int, block: int) -> _Plan:
    num_groups = group_sizes.shape[0]
    blocks = -(-group_sizes // block)
    block_ends = jnp.cumsum(blocks)
    row_starts = jnp.cumsum(group_sizes) - group_sizes
    index = jnp.arange(num_rows // block + num_groups)  # the most blocks there can be
    group = jnp.minimum(jnp.searchsorted(block_ends, index, side='right'), num_groups - 1)
    offset = (index - (block_ends - blocks)[group]) * block
    rows = jnp.clip(group_sizes[group] - offset, 0, block)
    return _Plan(group, row_starts[group] + offset, rows, block_ends[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x: Float[Array, 'm d'], w: Float[Array, 'e d f'], group_sizes: Int[Array, 'e'], block: int
) -> Float[Array, 'm f']:
    """See ``api.grouped_matmul``."""
    return _product(x, w, group_sizes, block, contract=0)


def _product(x: Array, w: Array, group_sizes: Array, block: int, contract: int) -> Array:
    """Rows times each group's matrix, contracting the matrix's first or second dimension."""
    num_rows = x.shape[0]
    plan = _plan(group_sizes, num_rows, block)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def step(i: Array, y: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, plan.start[i], block)
        matrix = jax.lax.dynamic_index_in_dim(w, plan.group[i], keepdims=False)
        product = jax.lax.dot_general(
            rows, matrix, (((1,), (contract,)), ((), ())), preferred_element_type=_wide(x.dtype)
        ).astype(x.dtype)
        # Rows past the group's end belong to the next group, whose own block comes later and overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(y, product, plan.start[i], axis=0)

    y = jnp.zeros((num_rows + block, w.shape[2 - contract]), x.dtype)
    y = jax.lax.fori_loop(0, plan.used, step, y)[:num_rows]
    return jnp.where((jnp.arange(num_rows) < group_sizes.sum())[:, None], y, 0)


def _forward(x: Array, w: Array, group_sizes: Array, block: int) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_matmul(x, w, group_sizes, block), (x, w, group_sizes)


def _backward(block: int, residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = residuals
    plan = _plan(group_sizes, x.shape[0], block)
    x_padded, dy_padded = (jnp.pad(value, ((0, block), (0, 0))) for value in (x, dy))

    def step(i: Array, dw: Array) -> Array:
        mine = (jnp.arange(block) < plan.rows[i])[:, None]
        rows = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x_padded, plan.start[i], block), 0)
        grads = jax.lax.dynamic_slice_in_dim(dy_padded, plan.start[i], block)
        product = jax.lax.dot_general(rows, grads, (((0,), (0,)), ((), ())), preferred_element_type=dw.dtype)
        so_far = jax.lax.dynamic_index_in_dim(dw, plan.group[i], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, so_far + product, plan.group[i], 0)  # an index alone: no scatter

    dw = jax.lax.fori_loop(0, plan.used, step, jnp.zeros(w.shape, _wide(w.dtype)))
    return _product(dy, w, group_sizes, block, contract=1), dw.astype(w.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
