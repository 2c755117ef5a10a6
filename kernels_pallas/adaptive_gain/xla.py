"""Adaptive gains in plain XLA: the matrix gain by WY chunks of matrix products, the diagonal one by an affine scan."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def unit_lower_inverse(A: jax.Array) -> jax.Array:
    """(I + A)^-1 of strictly lower A [..., n, n], by halving blocks: only matrix products, unlike a triangular solve."""
    return _inverse(A)


def _inverse(A: jax.Array) -> jax.Array:
    n = A.shape[-1]
    if n <= 8:
        # A is nilpotent, so I - A + A^2 - ... ends; its partial sums double in length with every product.
        power, length = -A, 2
        total = jnp.eye(n, dtype=A.dtype) + power
        while length < n:
            power = power @ power
            total = total + total @ power
            length *= 2
        return total
    h = n // 2
    top, bottom = _inverse(A[..., :h, :h]), _inverse(A[..., h:, h:])
    corner = -bottom @ (A[..., h:, :h] @ top)
    upper = jnp.concatenate([top, jnp.zeros((*A.shape[:-2], h, n - h), A.dtype)], -1)
    return jnp.concatenate([upper, jnp.concatenate([corner, bottom], -1)], -2)


def _inverse_forward(A):
    inverse = _inverse(A)
    return inverse, inverse


def _inverse_backward(inverse, g):
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-transposed @ g @ transposed,)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def matrix(e, phi, alpha, log_decay, reset, initial_gain, chunk):
    """Chunked matrix gain; shapes as in `reference.matrix`, reset may be None.

    Within a chunk the gain is `e^{G} K_in + sum_s e^{G - G_s} v_s phi_s^T` with v the solution of a unit lower
    triangular system, so everything but the state between chunks is matrix products. Documents are separated by a
    mask, not by a decay: a read comes before its token's write, so a decay of zero at a first token would come too
    late for its own read.
    """
    batch, length, heads, width = e.shape
    chunk = min(chunk, length)
    steps = -(-length // chunk)
    pad = steps * chunk - length

    def split(x):  # [B, T, H, ...] -> [steps, B, H, chunk, ...]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(batch, steps, chunk, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)

    strict = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    enters = leaves = None  # tokens that still see the incoming gain; tokens whose write the outgoing gain keeps
    if reset is not None:
        document = jnp.cumsum(reset, 1, dtype=jnp.int32)
        document = jnp.pad(document, ((0, 0), (0, pad)), mode='edge').reshape(batch, steps, chunk)
        document = jnp.moveaxis(document, 1, 0)[:, :, None]  # [steps, B, 1, chunk]
        before = jnp.concatenate([jnp.zeros_like(document[:1, ..., -1:]), document[:-1, ..., -1:]])
        enters = document == before
        leaves = document == document[..., -1:]
        strict = strict & (document[..., :, None] == document[..., None, :])

    e, phi, alpha, log_decay = map(split, (e, phi, alpha, log_decay))
    G = jnp.cumsum(log_decay, -1)
    G_read = G - log_decay
    mix = lambda difference: jnp.exp(jnp.where(strict, difference, -jnp.inf))
    A = alpha[..., None] * (phi @ jnp.swapaxes(phi, -1, -2)) * mix(G[..., :, None] - G[..., None, :])
    inverse = unit_lower_inverse(A)
    from_gain, read_gain, to_gain, keep_gain = jnp.exp(G), jnp.exp(G_read), jnp.exp(G[..., -1:] - G), jnp.exp(G[..., -1])
    if reset is not None:
        from_gain, read_gain = jnp.where(enters, from_gain, 0), jnp.where(enters, read_gain, 0)
        to_gain, keep_gain = jnp.where(leaves, to_gain, 0), jnp.where(enters[..., -1], keep_gain, 0)
    U = inverse @ (alpha[..., None] * phi)
    W = inverse @ ((alpha * from_gain)[..., None] * phi)
    Q = (e @ jnp.swapaxes(phi, -1, -2)) * mix(G_read[..., :, None] - G[..., None, :])

    def step(K, part):  # K is kept transposed, [B, H, key, value]
        U, W, Q, e_read, phi_write, keep = part
        v = U - W @ K
        out = e_read @ K + Q @ v
        return keep[..., None, None] * K + jnp.swapaxes(phi_write, -1, -2) @ v, out

    parts = (U, W, Q, read_gain[..., None] * e, to_gain[..., None] * phi, keep_gain)
    K, out = lax.scan(step, jnp.swapaxes(initial_gain, -1, -2), parts)
    out = jnp.moveaxis(jnp.moveaxis(out, 0, 1), 2, 3).reshape(batch, steps * chunk, heads, width)[:, :length]
    return out, jnp.swapaxes(K, -1, -2)


def _combine(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]


def diagonal(e, share, alpha, log_decay, reset, initial_gain):
    """Diagonal gain as an elementwise affine scan; shapes as in `reference.diagonal`, reset may be None."""
    decay = jnp.exp(log_decay)[..., None]
    rate = alpha[..., None] * share
    a, b = decay * (1 - rate), decay * rate
    fresh = None if reset is None else reset[:, :, None, None]
    if fresh is not None:
        a = jnp.where(fresh, 0, a)
        first = b[:, :1] + a[:, :1] * initial_gain[:, None]
    else:
        first = b[:, :1] + a[:, :1] * initial_gain[:, None]
    _, K = lax.associative_scan(_combine, (a, jnp.concatenate([first, b[:, 1:]], 1)), axis=1)
    read = jnp.concatenate([initial_gain[:, None], K[:, :-1]], 1)
    if fresh is not None:
        read = jnp.where(fresh, 0, read)  # the read precedes the write: the first token must not see the old gain
    return read * e, K[:, -1]
