"""The causal convolution of many lags in plain XLA: a loop over blocks of them, each a sum of shifted tokens.

Written out, the sum of K shifted arrays is one fusion, but its gradient stores K arrays of x's size. Here a round of
the loop adds `BLOCK` lags to a sum in float32, and the written-out gradient goes through the same rounds: no more than
x, the weights and the two sums of the gradient is ever stored.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 8  # lags a round


def unsupported(lags: Sequence[int], others: bool) -> str | None:
    """Why this cannot take a call, or None.

    Args:
      lags: as in `api.causal_conv1d`.
      others: whether a bias, an activation or the residual is asked for.
    """
    if tuple(lags) != tuple(range(len(lags))):
        return 'it takes the lags 0, 1, ... in their order'
    return 'it has no bias, activation or residual' if others else None


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _blocks(weight: jax.Array, x: jax.Array) -> jax.Array:
    """The lags' weights [K, C] by rounds, [rounds, BLOCK, C], those beyond the last 0, in the type of sums."""
    rounds = -(-len(weight) // BLOCK)
    padded = jnp.pad(weight.astype(_wide(x).dtype), ((0, rounds * BLOCK - len(weight)), (0, 0)))
    return padded.reshape(rounds, BLOCK, -1)


def _readable(reach: jax.Array | None, lag: jax.Array, values: jax.Array) -> jax.Array:
    """Values that a token would read `lag` tokens back, 0 where its document begins later; reach [B, T]."""
    return values if reach is None else jnp.where((reach >= lag)[..., None], values, 0)


def _before(x: jax.Array, past: jax.Array | None, length: int) -> jax.Array:
    """x with `length` tokens before it, the last of which are the past's."""
    known = 0 if past is None else past.shape[1]
    nothing = jnp.zeros((x.shape[0], length - known, x.shape[2]), x.dtype)
    return jnp.concatenate([nothing, x] if past is None else [nothing, past.astype(x.dtype), x], 1)


@jax.custom_vjp
def conv(x: jax.Array, weight: jax.Array, reach: jax.Array | None, past: jax.Array | None) -> jax.Array:
    """Output of `api.causal_conv1d` in x's type; reach int [B, T] or None: how far back a token may read."""
    batch, length, channels = x.shape
    if length == 1:
        return _of_one(x, weight, reach, past)
    blocks = _blocks(weight, x)
    values = _before(x, past, blocks.shape[0] * BLOCK - 1)

    def add(y, block):
        index, weights = block
        window = lax.dynamic_slice_in_dim(values, (len(blocks) - 1 - index) * BLOCK, length + BLOCK - 1, 1)
        for i in range(BLOCK):
            shifted = _wide(window[:, BLOCK - 1 - i : BLOCK - 1 - i + length])
            y = y + _readable(reach, index * BLOCK + i, shifted) * weights[i]
        return y, None

    start = jnp.zeros((batch, length, channels), blocks.dtype)
    y, _ = lax.scan(add, start, (jnp.arange(len(blocks)), blocks))
    return y.astype(x.dtype)


def _of_one(x, weight, reach, past):
    """One token, as it is decoded: one product with the window."""
    lags = jnp.arange(len(weight) - 1, -1, -1)
    values = _wide(_before(x, past, len(weight) - 1))
    if reach is not None:
        values = jnp.where((reach >= lags)[..., None], values, 0)
    return jnp.sum(values * _wide(weight)[::-1], 1, keepdims=True).astype(x.dtype)


def _forward(x, weight, reach, past):
    return conv(x, weight, reach, past), (x, weight, reach, past)


def _backward(kept, dy):
    x, weight, reach, past = kept
    blocks, length = _blocks(weight, x), x.shape[1]
    rounds, longest = len(blocks), len(weight) - 1
    values = _before(x, past, rounds * BLOCK - 1)
    before = 0 if past is None else longest  # tokens before x whose gradient is asked for
    # Token p of the past and x is read, `lag` tokens later, by token p - before + lag of x.
    padded = lambda array, fill: jnp.pad(
        array, ((0, 0), (before, rounds * BLOCK)) + ((0, 0),) * (array.ndim - 2), constant_values=fill
    )
    later, may = padded(dy, 0), None if reach is None else padded(reach, -1)
    wide_dy = _wide(dy)

    def add(dvalues, block):
        index, weights = block
        start, gradients = index * BLOCK, []
        window = lax.dynamic_slice_in_dim(values, (rounds - 1 - index) * BLOCK, length + BLOCK - 1, 1)
        ahead = lax.dynamic_slice_in_dim(later, start, before + length + BLOCK - 1, 1)
        allowed = None if may is None else lax.dynamic_slice_in_dim(may, start, before + length + BLOCK - 1, 1)
        for i in range(BLOCK):
            shifted = _wide(window[:, BLOCK - 1 - i : BLOCK - 1 - i + length])
            gradients.append(jnp.sum(_readable(reach, start + i, shifted) * wide_dy, (0, 1)))
            readers = None if allowed is None else allowed[:, i : i + before + length]
            from_later = _wide(ahead[:, i : i + before + length])
            dvalues = dvalues + _readable(readers, start + i, from_later) * weights[i]
        return dvalues, jnp.stack(gradients)

    start = jnp.zeros((x.shape[0], before + length, x.shape[2]), wide_dy.dtype)
    dvalues, dweight = lax.scan(add, start, (jnp.arange(rounds), blocks))
    dweight = dweight.reshape(-1, x.shape[2])[: len(weight)].astype(weight.dtype)
    dpast = None if past is None else dvalues[:, :before].astype(past.dtype)
    return dvalues[:, before:].astype(x.dtype), dweight, None, dpast


conv.defvjp(_forward, _backward)
