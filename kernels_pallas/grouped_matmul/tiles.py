"""The tiles of rows of a grouped product: each of one group, from a list that XLA makes on the device."""

import jax
import jax.numpy as jnp

PART = 64  # rows of a warpgroup's products, and what is summed at a time
GROUPS = 2  # warpgroups that compute
ROWS = GROUPS * PART  # of a tile
COLUMNS = 128  # of a tile, 64 where there are no more
STEP = 8  # tiles of rows begin at multiples of it


def padded(rows: int) -> int:
    """A number of rows as the kernels take it: of whole steps, and at least a tile."""
    return max(rows + -rows % STEP, ROWS)


def most_tiles(rows: int, groups: int) -> int:
    """Tiles of rows there can be at most, of `padded` rows in all; those after the last group are one more group."""
    return (rows + (ROWS - 1 + STEP - 1) * (groups + 1)) // ROWS


def tiles(group_sizes: jax.Array, rows: int) -> dict[str, jax.Array]:
    """The tiles of rows of all groups, int32.

    Args:
      group_sizes: int [E].
      rows: in all, a multiple of `STEP`.

    Returns:
      Of each of `most_tiles`: `group`, E after the last; `step`, of which its first row is the `STEP`-fold; `begin` and
      `end`, the rows that are the group's. `count` [1], how many of them there are.
    """
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, rows - jnp.sum(sizes, dtype=jnp.int32))
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    begins = ends - sizes
    steps = begins // STEP
    counts = jnp.where(sizes > 0, -(-(ends - steps * STEP) // ROWS), 0)
    stops = jnp.cumsum(counts, dtype=jnp.int32)
    index = jnp.arange(most_tiles(rows, group_sizes.shape[0]), dtype=jnp.int32)
    group = jnp.sum(index[:, None] >= stops, axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, group_sizes.shape[0])
    step = steps[group] + (index - (stops - counts)[group]) * (ROWS // STEP)
    return {'group': group, 'step': step, 'begin': begins[group], 'end': ends[group], 'count': stops[-1:]}
