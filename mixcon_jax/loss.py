"""Cross-entropy in chunks of tokens: no array of more tokens than a chunk's times the vocabulary, either way."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import platform
from mixcon_jax.parallel.layout import constrain
from mixcon_jax.parallel.split import shards_of

CHUNK_LOGITS = 2**28  # at most, on a GPU: 1 GiB in float32


class Sums(NamedTuple):
    """Sums over the scored tokens.

    Attributes:
      total: what to differentiate, nll + z_coef * z; the others carry no gradient.
      nll: cross-entropy, in nats.
      z: logsumexp squared.
      correct: targets that no other token's logit exceeds.
    """

    total: Float[Array, '']
    nll: Float[Array, '']
    z: Float[Array, '']
    correct: Float[Array, '']


def cross_entropy(
    hidden: Float[Array, 'b t d'],
    head: Float[Array, 'd v'],
    targets: Int[Array, 'b t'],
    mask: Bool[Array, 'b t'],
    *,
    chunk: int = 0,
    z_coef: float = 0.0,
) -> Sums:
    """Sums of the cross-entropy over the masked tokens.

    Products run in the type of ``hidden`` and accumulate in float32, the type of logits and logsumexp. Gradients are
    formed in the forward pass, while a chunk's logits exist: that takes three products with the head a token, where
    computing the logits again would take four.

    Args:
      hidden: `[B, T, D]` features.
      head: `[D, V]` output weights.
      targets: `[B, T]` ids below V.
      mask: `[B, T]`, the tokens to score.
      chunk: tokens at a time on each device; 0 takes `usual_chunk`'s.
      z_coef: weight of the z-loss, logsumexp(logits)^2 (PaLM, Chowdhery et al., 2022).
    """
    batch, length = targets.shape
    # What a device holds goes through chunks of its own.
    rows, parts = shards_of('batch', batch), shards_of('sequence', length)
    shards = rows * parts
    tokens = batch * length // shards
    num_chunks = math.ceil(tokens / (chunk or usual_chunk(head.shape[1])))
    size = math.ceil(tokens / num_chunks)

    def split(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(rows, batch // rows, parts, length // parts, *x.shape[2:]), 2, 1)
        x = constrain(x.reshape(shards, tokens, *x.shape[4:]), 'shards', *[None] * (x.ndim - 3))
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - tokens)) + ((0, 0),) * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(shards, num_chunks, size, *x.shape[2:]), 1, 0)
        return constrain(x, None, 'shards', *[None] * (x.ndim - 2))

    return Sums(*_sums(split(hidden), head.astype(hidden.dtype), split(targets), split(mask), z_coef))


def usual_chunk(vocab: int) -> int:
    """Tokens a chunk that suit the platform.

    Every chunk reads and writes the gradient of the whole head, so that a GPU takes as many as have at most
    `CHUNK_LOGITS` on a device, rounded down to a power of two, which divides the usual numbers of tokens; others 1024.
    """
    if platform.platform() != 'gpu':
        return 1024
    most = max(1, CHUNK_LOGITS * shards_of('vocab', vocab) // vocab)
    return 1 << (most.bit_length() - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(h: Array, head: Array, targets: Array, mask: Array, z_coef: float) -> tuple[Array, ...]:
    """The sums over chunks of tokens `[chunks, shards, size, ...]`, without gradients."""

    def body(sums: Array, xs: tuple) -> tuple[Array, None]:
        h, targets, mask = xs
        return sums + _chunk_sums(h, head, targets, mask)[0], None

    head = _gathered(head)
    zeros = jnp.zeros((3,), jnp.promote_types(h.dtype, jnp.float32))
    sums, _ = jax.lax.scan(body, zeros, (h, targets, mask))
    return _with_total(sums, z_coef)


def _gathered(head: Array) -> Array:
    """The head with whole columns, once before the loop, where XLA would gather it once a chunk."""
    return constrain(head, None, 'vocab')


def _with_total(sums: Array, z_coef: float) -> tuple[Array, ...]:
    nll, z, correct = sums
    return nll + z_coef * z, nll, z, correct


def _chunk_sums(h: Array, head: Array, targets: Array, mask: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """One chunk's (nll, z, correct), and what its gradient is made of: logits, their logsumexp, the targets' places."""
    logits = jnp.einsum('scd,dv->scv', h, head, preferred_element_type=jnp.promote_types(h.dtype, jnp.float32))
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    highest, total, wanted = (_by_one_reduction if platform.platform() == 'gpu' else _by_three)(logits, hit)
    lse = jnp.log(total) + highest
    values = (lse - wanted, lse * lse, (wanted >= highest).astype(lse.dtype))
    return jnp.stack([jnp.sum(jnp.where(mask, value, 0)) for value in values]), (logits, lse, hit)


def _by_three(logits: Array, hit: Array) -> tuple[Array, Array, Array]:
    """Over the last axis: the highest logit, the sum of exp(logit - highest), and the logit where ``hit`` is True."""
    highest = logits.max(axis=-1)
    total = jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)
    return highest, total, jnp.sum(jnp.where(hit, logits, 0), axis=-1)


def _by_one_reduction(logits: Array, hit: Array) -> tuple[Array, Array, Array]:
    """The same, with the sum scaled anew where a higher logit is met (Milakov and Gimelshein, 2018).

    A GPU reads the logits once from memory in place of three times. A CPU, which does not fill its vectors with such
    a reduction, takes a fifth longer for the loss. Of an infinite logit the loss is no finite number in either form.
    """

    def merged(these: tuple, those: tuple) -> tuple[Array, Array, Array]:
        (highest, total, wanted), (highest_, total_, wanted_) = these, those
        shrink = jnp.exp(-jnp.abs(highest - highest_))
        both = jnp.where(highest >= highest_, total + total_ * shrink, total * shrink + total_)
        return jnp.maximum(highest, highest_), both, wanted + wanted_

    kind = logits.dtype.type
    nothing = (jnp.finfo(kind).min.astype(kind), kind(0), kind(0))
    terms = (logits, jnp.ones_like(logits), jnp.where(hit, logits, 0))
    return jax.lax.reduce(terms, nothing, merged, (logits.ndim - 1,))


def _sums_forward(h: Array, head: Array, targets: Array, mask: Array, z_coef: float) -> tuple[tuple, tuple]:
    """The sums, with the gradients of ``nll + z_coef * z`` as residuals."""
    shards, wide = h.shape[1], jnp.promote_types(h.dtype, jnp.float32)

    def body(carry: tuple, xs: tuple) -> tuple[tuple, Array]:
        sums, d_head = carry
        h, targets, mask = xs
        more, (logits, lse, hit) = _chunk_sums(h, head, targets, mask)
        d_lse = (1 + 2 * z_coef * lse)[..., None]
        d_logits = jnp.where(mask[..., None], jnp.exp(logits - lse[..., None]) * d_lse - hit, 0).astype(h.dtype)
        d_head = d_head + jnp.einsum('scd,scv->sdv', h, d_logits, preferred_element_type=wide)
        return (sums + more, d_head), jnp.einsum('scv,dv->scd', d_logits, head)

    head = _gathered(head)
    # Every shard adds up a gradient of its own; they meet once, after the loop. Of its part alone each device needs the
    # sum: XLA exchanges no more than that where no other axis has tokens.
    d_head = constrain(jnp.zeros((shards, *head.shape), wide), 'shards', None, 'vocab')
    (sums, d_head), d_h = jax.lax.scan(body, (jnp.zeros((3,), wide), d_head), (h, targets, mask))
    d_head = constrain(d_head.sum(axis=0), 'embed', 'vocab')
    return _with_total(sums, z_coef), (d_h, d_head.astype(head.dtype))


def _sums_backward(z_coef: float, residuals: tuple[Array, Array], cotangents: tuple) -> tuple:
    d_h, d_head = residuals
    scale = cotangents[0]
    return (d_h * scale).astype(d_h.dtype), (d_head * scale).astype(d_head.dtype), None, None


_sums.defvjp(_sums_forward, _sums_backward)
