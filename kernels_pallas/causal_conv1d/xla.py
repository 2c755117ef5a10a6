"""The causal convolution in plain XLA: a sum of shifted tokens, and its gradient in as few passes as fusions allow.

The gradient is written out so that nothing but x is kept from the forward pass and the only array between its two
fusions, the gradient of the sum before SiLU, is in x's own type: left to itself, XLA would store it in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _padded(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (before, after), (0, 0)))


def _lagged(values: jax.Array, lag: int, longest: int, length: int, reach: jax.Array | None) -> jax.Array:
    """Each token's predecessor by `lag`, wide, out of the past and the tokens, zero where it may not be read."""
    past = _wide(values[:, longest - lag : longest - lag + length])
    return past if reach is None or lag == 0 else jnp.where((reach >= lag)[..., None], past, 0)


def _sum(values, weight, bias, reach, lags, length):
    weight = _wide(weight)
    terms = (_lagged(values, lag, max(lags), length, reach) * weight[i] for i, lag in enumerate(lags))
    return sum(terms, _wide(bias)) if bias is not None else sum(terms)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def conv(x, weight, bias, reach, past, lags, silu, residual, gradient=None):
    """Output of `api.causal_conv1d` in x's type; bias, reach (int [B, T], how far back a token may read) and past may
    be None. Products and sums are in float32, or in float64 for float64 inputs. `gradient` in place of ours: a function
    of (x, dy, weight, bias, reach, past, lags, silu, residual)."""
    del gradient
    y = _sum(_values(x, past, max(lags)), weight, bias, reach, lags, x.shape[1])
    y = jax.nn.silu(y) if silu else y
    return (_wide(x) + y if residual else y).astype(x.dtype)


def _values(x, past, longest):
    return _padded(x, longest, 0) if past is None else jnp.concatenate([past.astype(x.dtype), x], 1)


def _forward(x, weight, bias, reach, past, lags, silu, residual, gradient):
    return conv(x, weight, bias, reach, past, lags, silu, residual, gradient), (x, weight, bias, reach, past)


def _backward(lags, silu, residual, gradient, kept, dy):
    x, weight, bias, reach, past = kept
    if gradient is not None:
        dx, dweight, dbias, dpast = gradient(x, dy, weight, bias, reach, past, lags, silu, residual)
        return dx, dweight, dbias, None, dpast
    length, longest = x.shape[1], max(lags)
    values = _values(x, past, longest)
    g = _wide(dy)
    if silu:
        y = _sum(values, weight, bias, reach, lags, length)
        share = jax.nn.sigmoid(y)
        g = g * (share * (1 + y * (1 - share)))
        if dy.dtype != g.dtype:  # the barrier makes XLA store the narrow one
            g = _wide(jax.lax.optimization_barrier(g.astype(dy.dtype)))
    linear = lambda values, weight, bias: _sum(values, weight, bias, reach, lags, length)
    _, transpose = jax.vjp(linear, _wide(values), weight, bias)
    dvalues, dweight, dbias = transpose(g)
    dx = dvalues[:, longest:] + _wide(dy) if residual else dvalues[:, longest:]
    dpast = None if past is None else dvalues[:, :longest].astype(past.dtype)
    return dx.astype(x.dtype), dweight, dbias, None, dpast


conv.defvjp(_forward, _backward)
