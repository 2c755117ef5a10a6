"""`delta_rule` in plain XLA: chunks of matrix products inside a `lax.scan`, each computed again by the backward pass.

What a token removes, `u_t = S_{t-1} removed_t`, depends on what earlier tokens of its chunk removed: a unit lower
triangular system, one a head and chunk (Yang et al., 2024). With the u, a chunk is two of linear attention with a
decay of each key dimension, whose exponents are never positive (`kernels_pallas.ssd.xla`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.ssd import xla as ssd

CHUNK = 32
product = partial(jnp.einsum, precision='highest')


class _Tokens(NamedTuple):
    """A chunk of C tokens."""

    x: Any  # [B, C, H, P]
    log_decay: Any  # [B, C, H, N]
    B: Any
    C: Any
    removed: Any
    rewritten: Any
    document: Any  # int [B, C], counts the resets from the row's start


def chunked(x, log_decay, B, C, removed, rewritten, reset, initial_state, chunk):
    """Output and final state of `api.delta_rule`; shapes as there, all of one type."""
    batch, length = x.shape[:2]
    chunk = min(chunk, length)
    # A document's number in its row: tokens of one number see one another, and those of 0 the initial state.
    document = jnp.cumsum(jnp.zeros((batch, length), bool) if reset is None else reset, 1, dtype=jnp.int32)
    chunks = -(-length // chunk)

    def split(value):
        mode = 'edge' if value is document else 'constant'  # padding goes on with the last document
        behind = ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (value.ndim - 2)
        return jnp.moveaxis(jnp.pad(value, behind, mode=mode).reshape(batch, chunks, chunk, *value.shape[2:]), 1, 0)

    carry = initial_state, jnp.zeros(batch, jnp.int32)
    tokens = _Tokens(*map(split, (x, log_decay, B, C, removed, rewritten, document)))
    (final, _), y = lax.scan(jax.checkpoint(_chunk, prevent_cse=False), carry, tokens)
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, *x.shape[2:])[:, :length], final


def _chunk(carry, tokens: _Tokens):
    """The state and the number of the document after a chunk, and its outputs."""
    (state, before), (x, log_decay, B, C, removed, rewritten, document) = carry, tokens
    length = x.shape[1]
    same = document[:, :, None] == document[:, None, :]
    entering, leaving = document == before[:, None], document == document[:, -1:]
    after = ssd.running(log_decay)
    ahead, total = jax.tree.map(ssd.behind, after), jax.tree.map(lambda value: value[:, -1:], after)

    def scores(queries, keys, exclusive):
        """`sum_n queries_tn keys_sn exp(decay between them)_n`, [B, H, t, s]."""
        sums, read = (jax.tree.map(lambda v: v[:, :, :, None], pair) for pair in (after, ahead if exclusive else after))
        return ssd.scores_by_key(queries, keys, x.dtype, sums, read, ssd.visible(length, same, exclusive))[:, :, 0]

    seen = ssd.masked(ssd.between(after, None), entering)
    seen_before = ssd.masked(ssd.between(ahead, None), entering)
    left = ssd.masked(ssd.between(total, after), leaving)
    kept = jnp.where(entering[:, -1, None, None], jnp.exp(total[0] + total[1])[:, 0], 0)[:, :, None]

    gone = product('bhpn,bthn->bhtp', state, removed * seen_before)
    gone = gone + product('bhts,bshp->bhtp', scores(removed, B, True), x)
    system = jnp.eye(length, dtype=x.dtype) + scores(removed, rewritten, True)
    gone = jax.scipy.linalg.solve_triangular(system, gone, lower=True, unit_diagonal=True)

    y = product('bhpn,bthn->bthp', state, C * seen) + product('bhts,bshp->bthp', scores(C, B, False), x)
    y = y - product('bhts,bhsp->bthp', scores(C, rewritten, False), gone)
    state = state * kept + product('bshp,bshn->bhpn', x, B * left)
    state = state - product('bhsp,bshn->bhpn', gone, rewritten * left)
    return (state, document[:, -1]), y
