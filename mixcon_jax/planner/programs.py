"""The programs that a plan compiles: the train step, and generation's prefill and decode, on absent devices."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.attention.xla import turns
from kernels_pallas.grouped_matmul.xla import block_rows
from mixcon_jax.inference import generate
from mixcon_jax.inference.load import drop_no_token
from mixcon_jax.models.decoder import abstract
from mixcon_jax.parallel import axes
from mixcon_jax.parallel.rules import on_mesh
from mixcon_jax.step import BATCH, Steps
from mixcon_jax.trees import named_leaves, to_state


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


def unknown_rounds(
    config: ml_collections.ConfigDict, mesh: Mesh, what: str = 'train', batch: int = 1, context: int = 0
) -> Callable[[str], float]:
    """Rounds to count of a loop whose number only data tell, by what XLA names it after.

    Of attention over tiles, where queries do not begin with the keys: of a row that is shared out over devices those of
    the last, which has most to do and for which the others wait; of prefill those of a whole context, of decoding those
    of a full one. Of blocks of the experts' portable products the mean: an expert's last is half full. JAX's default
    device is to be the one compiled for, which sizes of tiles and blocks depend on.

    Args:
      config: resolved.
      mesh: over which it is spread.
      what: 'train', 'prefill' or 'decode'.
      batch, context: of the latter two, sequences and tokens.
    """
    model, sizes = config.model, mesh.shape
    rows = config.train.batch_size // config.train.accum_steps if what == 'train' else batch
    keys = config.data.seq_len if what == 'train' else context
    queries = {'train': keys // sizes['context'], 'prefill': keys, 'decode': 1}[what]
    tiles = turns(queries, keys, keys - queries, model.attention.block_size or None)
    tokens = rows * (1 if what == 'decode' else keys) // axes.rows(sizes) // sizes['context']
    pairs, experts = max(1, tokens) * model.moe.top_k, max(1, model.moe.num_experts // sizes['expert'])
    block = model.moe.group_block or block_rows(pairs, experts, jnp.dtype(model.dtype))
    return lambda operation: pairs / block + experts / 2 if 'grouped_matmul' in operation else tiles


def without_drops(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration that generation has on a mesh."""
    config = config.copy_and_resolve_references()
    drop_no_token(config.model)
    return config


def decode_state(config: ml_collections.ConfigDict, steps: Steps, batch: int, context: int) -> Any:
    """The state that generation carries, as shapes and types where they lie; arguments as of ``generation``."""
    graphdef, variables = nnx.split(abstract(config.model))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda v: nnx.merge(graphdef, v).init_state(batch, context), variables),
        generate.state_shardings(graphdef, variables, batch, context, steps.mesh),
    )


def generation(config: ml_collections.ConfigDict, steps: Steps, what: str, batch: int, context: int) -> Any:
    """What `inference.generate` runs, lowered for CUDA: ``context`` tokens at once, or one after them.

    Parameters lie as in training; rows of the state and of the tokens are shared out where the mesh divides them.

    Args:
      config: of ``without_drops``.
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
    state = decode_state(config, steps, batch, context)
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
