"""The embedding's look-up, and a gradient of it that adds up tokens in a fixed order on every device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def lookup(table: Float[Array, 'v d'], tokens: Int[Array, '*b'], gradient: str = 'scatter') -> Float[Array, '*b d']:
    """The rows of a table by their indices.

    Args:
      table: one row a token of the vocabulary.
      tokens: indices below the number of rows.
      gradient: of the table, 'scatter', XLA's, which on a GPU adds in whatever order its threads come; or 'sorted', by
        `sums_by_token`, which has one order.
    """
    return _sorted_lookup(table, tokens, len(table)) if gradient == 'sorted' else table[tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sorted_lookup(table: Array, tokens: Array, vocab_size: int) -> Array:
    return table[tokens]


def _forward(table: Array, tokens: Array, vocab_size: int) -> tuple[Array, Array]:
    return table[tokens], tokens


def _backward(vocab_size: int, tokens: Array, dy: Array) -> tuple[Array, None]:
    return sums_by_token(dy.reshape(-1, dy.shape[-1]), tokens.reshape(-1), vocab_size).astype(dy.dtype), None


_sorted_lookup.defvjp(_forward, _backward)


def sums_by_token(rows: Float[Array, 'n d'], tokens: Int[Array, 'n'], vocab_size: int) -> Float[Array, 'v d']:
    """The sum of each token's rows, in at least float32, zero for a token that has none.

    Rows are sorted by their tokens and added up within each token by a scan whose tree depends on their number alone;
    the last sum of each token is its row of the result. No two threads ever write to one place.
    """
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    if not len(tokens):
        return jnp.zeros((vocab_size, rows.shape[1]), rows.dtype)
    order = jnp.argsort(tokens, stable=True)
    ordered = tokens[order]
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    _, sums = jax.lax.associative_scan(_add, (first[:, None], rows[order]))
    last = jnp.searchsorted(ordered, jnp.arange(vocab_size), side='right', method='scan_unrolled') - 1
    found = (last >= 0) & (ordered[last] == jnp.arange(vocab_size))
    return jnp.where(found[:, None], sums[last], 0)


def _add(
    left: tuple[Bool[Array, 'n 1'], Float[Array, 'n d']], right: tuple[Bool[Array, 'n 1'], Float[Array, 'n d']]
) -> tuple[Bool[Array, 'n 1'], Float[Array, 'n d']]:
    """Joins two runs of rows: whether a token begins in it, and the sum since the last that does."""
    return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])
