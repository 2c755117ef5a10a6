"""How likely a model finds the last tokens of texts: what multiple choices and texts of any length are scored by."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import Decoder
from mixcon_jax.parallel import axes, layout
from mixcon_jax.parallel.rules import Place

LOGITS = 2**26  # at most at a time: 256 MiB in float32


class Ending(NamedTuple):
    """Tokens of which the last ``scored`` are to be predicted, each from all before it."""

    tokens: Sequence[int]
    scored: int


class Likelihood(NamedTuple):
    """The logarithm of the probability of an ending, in nats, and whether each of its tokens is the likeliest."""

    log: float
    greedy: bool


def likelihoods(
    model: Decoder,
    endings: Sequence[Ending],
    batch_size: int,
    place: Place | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[Likelihood]:
    """Scores endings, in the order that they are given in.

    Endings of about one length go through the model together, the longest first; their lengths are rounded up to few
    that each are compiled for once.

    Args:
      model: the decoder.
      endings: each of two tokens or more, of which one is not scored.
      batch_size: rows at a time; on a mesh as many more as its devices share out evenly.
      place: the mesh that the model's parameters lie on.
      done: takes how many have been scored, after each batch.
    """
    found: dict[int, Likelihood] = {}
    graphdef, variables = nnx.split(model)
    if place:
        shards = axes.rows(place.mesh.shape)
        batch_size = -(-batch_size // shards) * shards
    for rows in longest_first([ending.tokens for ending in endings], batch_size):
        length = rounded_up(len(endings[rows[0]].tokens) - 1)
        batch = _filled([endings[i] for i in rows], batch_size, length)
        if place:
            batch = tuple(jax.device_put(each, layout.batch_sharding(place.mesh)) for each in batch)
        logs, greedy = (np.asarray(each) for each in _score(graphdef, variables, *batch, place=place))
        for row, i in enumerate(rows):
            found[i] = Likelihood(float(logs[row]), bool(greedy[row]))
        done(len(found))
    return [found[i] for i in range(len(endings))]


def longest_first(texts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """The places of texts in batches of about one length, the longest first."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def rounded_up(length: int, least: int = 32) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: at most half as many tokens again, and few lengths to compile for."""
    power = max(least, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > least and length <= power * 3 // 4 else power


def _filled(endings: Sequence[Ending], rows: int, length: int) -> tuple[np.ndarray, ...]:
    """Tokens, targets, which of these are scored, and which tokens are real, of endings and of rows without any."""
    tokens, targets = np.zeros((2, rows, length), np.int32)
    scored, real = np.zeros((2, rows, length), bool)
    for row, (ids, count) in enumerate(endings):
        last = len(ids) - 1
        tokens[row, :last], targets[row, :last] = ids[:-1], ids[1:]
        scored[row, last - count : last], real[row, :last] = True, True
    return tokens, targets, scored, real


@functools.partial(jax.jit, static_argnums=0, static_argnames='place')
def _score(
    graphdef: nnx.GraphDef,
    variables: Any,
    tokens: Int[Array, 'b t'],
    targets: Int[Array, 'b t'],
    scored: Bool[Array, 'b t'],
    real: Bool[Array, 'b t'],
    place: Place | None = None,
) -> tuple[Float[Array, 'b'], Bool[Array, 'b']]:
    """The sum of the scored targets' log-probabilities in each row, and whether all of them are the likeliest."""
    model = nnx.merge(graphdef, variables)
    rows, length = tokens.shape
    context = Context(real.astype(jnp.int32), jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape))
    with place.entered() if place else contextlib.nullcontext():
        hidden = model(tokens, context)[0]
        vocab = jax.eval_shape(model.logits, hidden[:, :1]).shape[-1]
        chunk = max(1, min(length, LOGITS // (rows * vocab)))

        def add(sums: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
            hidden, targets, scored = xs
            logits = model.logits(hidden).astype(jnp.float32)
            wanted = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            log = wanted - jax.nn.logsumexp(logits, axis=-1)
            highest = wanted >= logits.max(axis=-1)
            total, all_highest = sums
            return (
                total + jnp.sum(jnp.where(scored, log, 0), axis=1),
                all_highest & (highest | ~scored).all(axis=1),
            ), None

        start = (jnp.zeros(rows, jnp.float32), jnp.ones(rows, bool))
        sums, _ = jax.lax.scan(add, start, tuple(_in_chunks(x, chunk) for x in (hidden, targets, scored)))
    if place:
        sums = jax.lax.with_sharding_constraint(sums, layout.replicated(place.mesh))
    return sums


def _in_chunks(x: Array, chunk: int) -> Array:
    """`[B, T, ...]` as `[chunks, B, chunk, ...]`, the last filled up with zeros."""
    rows, length, *rest = x.shape
    chunks = -(-length // chunk)
    x = jnp.pad(x, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(rows, chunks, chunk, *rest), 1, 0)
