"""The features of a trained model after its embedding and after each of its layers: the residual stream."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import Decoder
from mixcon_jax.parallel.layout import constrain, place_rows
from mixcon_jax.parallel.rules import Place

KEYS = ('tokens', 'segment_ids', 'positions')

Batch = Mapping[str, np.ndarray]


def names(model) -> list[str]:
    """What ``reader`` yields, in its order: 'embedding' and every layer as the pattern of ``config.model`` has it."""
    return ['embedding', *model.pattern * model.num_blocks]


def reader(model: Decoder, place: Place | None = None) -> Callable[[Batch], Iterator[Float[Array, 'b t d']]]:
    """Returns ``read(batch)``, which yields the features `[B, T, D]` in ``config.dtype``, one after another.

    First those of the embedding, then the sum that each layer leaves, before any norm: of the last, the decoder's final
    norm makes its hidden features. They are computed a block at a time by one compiled program, so that no more than a
    block's are held.

    Args:
      model: the decoder.
      place: the mesh that its parameters are shared out over; None is one device.
    """
    graphdef, variables = nnx.split(model)

    def here() -> contextlib.AbstractContextManager:
        return place.entered() if place else contextlib.nullcontext()

    @jax.jit
    def embed(variables: nnx.State, tokens: Int[Array, 'b t']) -> Float[Array, 'b t d']:
        with here():
            return nnx.merge(graphdef, variables).embed(constrain(tokens, 'batch', 'sequence'))

    @jax.jit
    def block(
        variables: nnx.State, index: Int[Array, ''], x: Float[Array, 'b t d'], batch: Mapping[str, Int[Array, 'b t']]
    ) -> list[Float[Array, 'b t d']]:
        with here():
            segments, positions = (constrain(batch[key], 'batch', 'sequence') for key in KEYS[1:])
            context, found = Context(segments, positions), []
            for layer in nnx.merge(graphdef, variables).block(index).layers:
                x, _, _ = layer(x, context, None)
                found.append(x)
            return found

    def read(batch: Batch) -> Iterator[Float[Array, 'b t d']]:
        chosen = {key: batch[key] for key in KEYS}
        placed = place_rows(chosen, place.mesh) if place else jax.tree.map(jnp.asarray, chosen)
        x = embed(variables, placed['tokens'])
        yield x
        for index in range(model.config.num_blocks):
            found = block(variables, jnp.int32(index), x, placed)
            x = found[-1]
            yield from found

    return read
