"""The mesh axes by name, and running a computation on each device's own rows, or its own part of the sequence."""

import math
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
    return _shards((SEQUENCE_AXIS,), length)


def token_axes(batch: int, length: int) -> tuple[str, ...]:
    """The mesh axes that share out the tokens of a batch ``[batch, length]`` in this step, by rows and by sequence."""
    rows = BATCH_AXES if _shards(BATCH_AXES, batch) > 1 else ()
    return (*rows, SEQUENCE_AXIS) if sequence_shards(length) > 1 else rows


def by_tokens(
    function: Callable[..., Any],
    tokens: Mapping[str, Any],
    rows: Mapping[str, Any],
    whole: Mapping[str, Any],
    outputs: bool | tuple[bool, ...],
    axes: tuple[str, ...],
) -> Any:
    """Runs ``function(**tokens, **rows, **whole)`` on each device's own tokens; other mesh axes stay with XLA.

    For what reads other tokens of its row: the function communicates along the mesh axis ``context``. For kernels, too,
    which XLA cannot split: it would give every device all their inputs.

    Args:
      function: returns an array or a tuple of them.
      tokens: arrays ``[B, T, ...]``, or trees of them.
      rows: arrays ``[B, ...]``, the same on all devices that share a row.
      whole: arrays that every device gets whole; their gradients are summed over the devices.
      outputs: of each output, whether it is of tokens or, the same on all devices that share them, of rows.
      axes: the mesh axes to split over, of ``token_axes``.
    """
    by_row = tuple(axis for axis in BATCH_AXES if axis in axes) or None
    split, per_row = PartitionSpec(by_row, SEQUENCE_AXIS if SEQUENCE_AXIS in axes else None), PartitionSpec(by_row)
    return jax.shard_map(
        lambda tokens, rows, whole: function(**tokens, **rows, **whole),
        in_specs=(split, per_row, PartitionSpec()),
        out_specs=jax.tree.map(lambda of_tokens: split if of_tokens else per_row, outputs),
        axis_names=set(axes),
        check_vma=False,
    )(dict(tokens), dict(rows), dict(whole))


def _shards(axes: Sequence[str], size: int) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape.get(axis, 1) for axis in axes)
    return shards if size % shards == 0 else 1
