"""The mesh axes by name, and running a computation on each device's own rows, or its own part of the sequence."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
BATCH_AXES = ('data', 'fsdp')  # the mesh axes that share out the rows of a batch
SEQUENCE_AXIS = 'context'  # the mesh axis that shares out the tokens of a row


def by_rows(function: Callable[..., Array], rows: Sequence[Array], whole: Sequence[Array]) -> Array:
    """Runs ``function(*rows, *whole)`` on each device's own tokens of a batch, which need nothing of one another.

    For computations that XLA cannot split by itself, such as a sort: without this every device would gather all rows.

    Args:
      function: takes arrays and returns one ``[B, T, ...]``.
      rows: arrays ``[B, T, ...]``, whose rows and tokens the mesh shares out.
      whole: arrays that every device gets whole, such as weights; their gradients are summed over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*rows, *whole)
    tokens = SEQUENCE_AXIS if sequence_shards(rows[0].shape[1]) > 1 else None
    split, everywhere = PartitionSpec(BATCH_AXES, tokens), PartitionSpec()
    specs = (split,) * len(rows) + (everywhere,) * len(whole)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(*rows, *whole)


def sequence_shards(length: int) -> int:
    """Into how many parts the mesh of this step splits a sequence of this length: 1 where it does not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape.get(SEQUENCE_AXIS, 1)
    return shards if length % shards == 0 else 1


def by_sequence(
    function: Callable[..., Any],
    tokens: Mapping[str, Any],
    whole: Mapping[str, Any],
    outputs: bool | tuple[bool, ...],
) -> Any:
    """Runs ``function(**tokens, **whole)`` on each device's own part of the sequence; other axes stay with XLA.

    Args:
      function: may communicate over the mesh axis ``context``; returns an array or a tuple of them.
      tokens: arrays ``[B, T, ...]``, or trees of them, split along T.
      whole: arrays that every device gets whole; their gradients are summed over the devices.
      outputs: of each output, whether it is of tokens; if not, it must be the same on every device.
    """
    split, everywhere = PartitionSpec(None, SEQUENCE_AXIS), PartitionSpec()
    return jax.shard_map(
        lambda tokens, whole: function(**tokens, **whole),
        in_specs=(split, everywhere),
        out_specs=jax.tree.map(lambda of_tokens: split if of_tokens else everywhere, outputs),
        axis_names={SEQUENCE_AXIS},
        check_vma=False,
    )(dict(tokens), dict(whole))
