"""Adaptive gains in plain XLA: the matrix gain by WY chunks of matrix products, the diagonal one by an affine scan."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import platform
from kernels_pallas.adaptive_gain import reference
from kernels_pallas.affine import compose

GROUP = 256  # tokens whose chunks are prepared together; more would only cost memory
STEPPED_CHUNK = 8  # diagonal gain
ASSOCIATIVE_CHUNK = 256


# ------------------------------------------------------------------------------------------------- matrix gain
@jax.custom_vjp
def unit_lower_inverse(A: jax.Array) -> jax.Array:
    """(I + A)^-1 of strictly lower A [..., n, n], by halving blocks: matrix products only."""
    return _inverse(A)


def _inverse(A: jax.Array) -> jax.Array:
    n = A.shape[-1]
    if n <= 8:
        # A is nilpotent, so I - A + A^2 - ... ends, and doubling sums it. Only for small n: with repeated errors the
        # terms grow like binomial coefficients and cancel.
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


def matrix(phi, alpha, log_decay, reset, initial_gain, chunk, group=GROUP):
    """`K_k phi_k` of the matrix gain; shapes as in `reference.matrix`, reset may be None.

    Rematerialised groups of chunks: what is parallel over chunks exists for one group at a time.
    """
    batch, length, heads, width = phi.shape
    chunk = min(chunk, length)
    size = min(max(group // chunk, 1), -(-length // chunk)) * chunk
    groups, per_group = -(-length // size), size // chunk

    def split(x):  # [B, T, H, ...] -> [groups, chunks, B, H, chunk, ...]; padding (phi = alpha = 0) changes no gain
        x = jnp.pad(x, ((0, 0), (0, groups * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(batch, groups, per_group, chunk, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2, 4), (0, 1, 3))

    parts = {'phi': split(phi), 'alpha': split(alpha), 'log_decay': split(log_decay)}
    if reset is not None:
        document = jnp.cumsum(reset, 1, dtype=jnp.int32)
        document = jnp.pad(document, ((0, 0), (0, groups * size - length)), mode='edge')
        before = jnp.pad(document, ((0, 0), (1, 0)))[:, :-1]  # of the token before; the initial gain is document 0's
        parts['document'] = split(document[:, :, None])
        parts['before'] = split(before[:, :, None])[..., :1]

    @partial(jax.checkpoint, prevent_cse=False)
    def body(K, part):
        return _group(K, **part)

    K, out = lax.scan(body, jnp.swapaxes(initial_gain, -1, -2), parts)
    out = jnp.moveaxis(out, (0, 1, 3), (1, 2, 4)).reshape(batch, groups * size, heads, width)[:, :length]
    return out, jnp.swapaxes(K, -1, -2)


def _group(K, phi, alpha, log_decay, document=None, before=None):
    """`c_t = K_t phi_t` [chunks, B, H, chunk, P] from the transposed gain K [B, H, key, value] before the group.

    In a chunk `K_t = r_t K_in + sum_{s<t} m_ts v_s phi_s^T`, where r and m are decays and v_s = alpha_s (phi_s -
    lam_s c_s). So c solves a unit lower triangular system, `(I + S diag(alpha lam)) c = r Phi K_in^T + S diag(alpha)
    Phi` with `S = m * Phi Phi^T`, and all but the gain from chunk to chunk is matrix products over all chunks at once.

    Documents are separated by masking S and r, not by a decay of zero at their first token: the read comes before
    the write, so such a decay would come too late for that token's own read.
    """
    chunk = phi.shape[-2]
    # A few enormous decays would leave their sums no digits for the others; beyond these bounds lam is below rounding.
    log_decay = jnp.maximum(log_decay, -40.0 if phi.dtype == jnp.float64 else -20.0)
    total = jnp.cumsum(log_decay, -1)
    until = total - log_decay  # the decay a read sees excludes the token's own
    strict = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    read, write, keep = jnp.exp(until), jnp.exp(total[..., -1:] - total), jnp.exp(total[..., -1])
    if document is not None:
        strict = strict & (document[..., :, None] == document[..., None, :])
        enters = document == before
        read = jnp.where(enters, read, 0)
        write = jnp.where(document == document[..., -1:], write, 0)
        keep = jnp.where(enters[..., -1], keep, 0)
    # Differences of logs, masked before exp: never exp(-total).
    logs = jnp.where(strict, until[..., :, None] - total[..., None, :], -jnp.inf)
    S = (phi @ jnp.swapaxes(phi, -1, -2)) * jnp.exp(logs)
    forget = alpha * jnp.exp(log_decay)
    learn = alpha[..., None] * phi
    inverse = unit_lower_inverse(S * forget[..., None, :])
    own = inverse @ (S @ learn)
    from_gain = inverse @ (read[..., None] * phi)
    write_phi = jnp.swapaxes(write[..., None] * phi, -1, -2)

    def step(K, part):
        own, from_gain, write_phi, learn, forget, keep = part
        c = own + from_gain @ K
        return keep[..., None, None] * K + write_phi @ (learn - forget[..., None] * c), c

    return lax.scan(step, K, (own, from_gain, write_phi, learn, forget, keep))


# ------------------------------------------------------------------------------------------------- diagonal gain
def diagonal(e, alpha, log_decay, reset, initial_gain, chunk=None):
    """Diagonal gain; shapes as in `reference.diagonal`, reset may be None. Keeps e and the gains between chunks."""
    stepped = platform.platform() == 'cpu'
    batch, length, heads, width = e.shape
    chunk = min(chunk or (STEPPED_CHUNK if stepped else ASSOCIATIVE_CHUNK), length)
    chunks = -(-length // chunk)

    def split(x):  # [B, T, ...] -> [chunks, chunk, B, ...]; padding (alpha = 0) changes no gain
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 0, 2)

    @partial(jax.checkpoint, prevent_cse=False)
    def body(K, part):
        e, alpha, log_decay, reset = part
        rate = alpha[..., None] * reference.error_share(e)
        b = jnp.exp(log_decay)[..., None] * rate
        a = jnp.exp(log_decay)[..., None] * (1 - rate)
        if reset is not None:
            fresh = reset[..., None, None]
            a = jnp.where(fresh, 0, a)
        if stepped:
            # Barriers keep XLA:CPU from fusing the chain into every later token, which recomputes it each time.
            a, b = lax.optimization_barrier((a, b))
            gains = [K]
            for t in range(chunk):
                gains.append(lax.optimization_barrier(a[t] * gains[-1] + b[t]))
            read, K = jnp.stack(gains[:-1]), gains[-1]
        else:
            first = b[:1] + a[:1] * K
            _, after = lax.associative_scan(compose, (a, jnp.concatenate([first, b[1:]])))
            read, K = jnp.concatenate([K[None], after[:-1]]), after[-1]
        if reset is not None:
            read = jnp.where(fresh, 0, read)  # the first token must not see the old document's gain
        return K, read * e

    parts = (split(e), split(alpha), split(log_decay), None if reset is None else split(reset))
    K, out = lax.scan(body, initial_gain, parts)
    return jnp.moveaxis(out, 2, 0).reshape(batch, chunks * chunk, heads, width)[:, :length], K
