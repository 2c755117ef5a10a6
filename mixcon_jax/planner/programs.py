"""The programs that a plan compiles: the train step, and generation's prefill and decode, on absent devices."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.attention.xla import tile_size
from mixcon_jax.inference import generate
from mixcon_jax.models.decoder import abstract
from mixcon_jax.parallel import axes
from mixcon_jax.parallel.rules import on_mesh
from mixcon_jax.step import Steps
from mixcon_jax.trees import named_leaves, to_state

BATCH = {'tokens': 'int32', 'targets': 'int32', 'loss_mask': 'bool', 'segment_ids': 'int32', 'positions': 'int32'}


def train_step(config: ml_collections.ConfigDict, steps: Steps) -> Any:
    """The true train step, lowered for CUDA.

    Args:
      config: resolved.
      steps: of it, on a mesh of absent devices; the first must be JAX's default device.
    """
    shape = config.train.batch_size, config.data.seq_len
    batch = {key: jax.ShapeDtypeStruct(shape, kind) for key, kind in BATCH.items()}
    step: Any = steps.train_step
    return step.trace(steps.abstract_state, batch).lower(lowering_platforms=('cuda',))


def unknown_rounds(config: ml_collections.ConfigDict) -> float:
    """Rounds to count of attention's loop where data says how many: a causal triangle's mean.

    JAX's default device is to be the one compiled for, which the size of a tile depends on.
    """
    length = config.data.seq_len
    tile = min(length, tile_size(length, config.model.attention.block_size or None))
    return (-(-length // tile) + 1) / 2


def generation(config: ml_collections.ConfigDict, steps: Steps, what: str, batch: int, context: int) -> Any:
    """What `inference.generate` runs, lowered for CUDA: ``context`` tokens at once, or one after them.

    Parameters lie as in training; rows of the state and of the tokens are shared out where the mesh divides them.

    Args:
      config: resolved.
      steps: of it, on a mesh of absent devices.
      what: 'prefill' or 'decode'.
      batch: sequences.
      context: tokens that the state has room for.
    """
    mesh = steps.mesh
    model = abstract(config.model)
    graphdef, *both = nnx.split(model, nnx.Param, ...)
    params, rest = both
    by_row = axes.BATCH_AXES if batch % axes.rows(mesh.shape) == 0 else None
    place = lambda x, *spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    variables = nnx.merge_state(to_state(steps.abstract_state.params, params), jax.tree.map(place, rest))
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda v: nnx.merge(graphdef, v).init_state(batch, context), variables),
        generate.state_shardings(graphdef, variables, batch, context, mesh),
    )
    new = 1 if what == 'decode' else context
    tokens = place(jax.ShapeDtypeStruct((batch, new), jnp.int32), by_row)
    seeds = place(jax.ShapeDtypeStruct((batch,), jnp.uint32))
    index, rules = place(jax.ShapeDtypeStruct((), jnp.int32)), axes.rules(config.mesh)

    def step(variables, seeds, tokens, positions, state, index):
        with on_mesh(mesh, rules):
            run, sampling = generate._step.__wrapped__, generate.Sampling()
            return run(graphdef, sampling, config.model.vocab_size, variables, seeds, tokens, positions, state, index)

    traced = jax.jit(step, donate_argnums=4).trace(variables, seeds, tokens, tokens, state, index)
    return traced.lower(lowering_platforms=('cuda',))


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device, by their shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def replicated(steps: Steps, least: int) -> dict[str, int]:
    """Parameters that lie whole on every device of a mesh that splits some, with their bytes, if so many at least."""
    found: Mapping[str, Any] = named_leaves(steps.abstract_state.params)
    sizes = {name: leaf.size * leaf.dtype.itemsize for name, leaf in found.items() if leaf.sharding.is_fully_replicated}
    return {name: size for name, size in sizes.items() if size >= least and steps.mesh.size > 1}
