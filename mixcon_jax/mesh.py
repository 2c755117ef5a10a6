"""The mesh axes by name, and running a computation on each device's own rows."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
BATCH_AXES = ('data', 'fsdp')  # the mesh axes that share out the rows of a batch


def by_rows(function: Callable[..., Array], rows: Sequence[Array], whole: Sequence[Array]) -> Array:
    """Runs ``function(*rows, *whole)`` on each device's own rows of a batch.

    For computations that XLA cannot split by itself, such as a sort: without this every device would gather all rows.

    Args:
      function: takes arrays and returns one whose first dimension is the rows'.
      rows: arrays ``[B, ...]`` that the batch axes of the mesh share out.
      whole: arrays that every device gets whole, such as weights; their gradients are summed over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*rows, *whole)
    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    specs = (split,) * len(rows) + (everywhere,) * len(whole)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(*rows, *whole)
