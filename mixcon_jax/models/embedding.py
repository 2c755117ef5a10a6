"""The embedding's look-up, and a gradient of it that adds up tokens in a fixed order on every device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixcon_jax.parallel.layout import constrain
from mixcon_jax.parallel.split import TOKENS, axes_of, by_parts, shards_of


def lookup(
    table: Float[Array, 'v d'], tokens: Int[Array, 'b t'], dtype: jnp.dtype, gradient: str = 'scatter'
) -> Float[Array, 'b t d']:
    """The rows of a table by their indices, in the type that the model computes in.

    Args:
      table: one row a token of the vocabulary.
      tokens: indices below the number of rows.
      dtype: of the result.
      gradient: of the table, 'scatter', XLA's, which on a GPU adds in whatever order its threads come; or 'sorted', by
        `sums_by_token`, which has one order. On a mesh each device adds up its own tokens, and devices meet once.
    """
    if gradient == 'sorted':
        return _sorted_lookup(table, tokens, dtype, jax.ShapeDtypeStruct(table.shape, table.dtype))
    return _gathered(table)[tokens].astype(dtype)  # in this order, since a scatter adds up in its array's type


def _gathered(table: Array) -> Array:
    """The table with whole rows: XLA would otherwise look up parts of them, and exchange features."""
    return constrain(table, 'vocab', None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sorted_lookup(table: Array, tokens: Array, dtype: jnp.dtype, like: jax.ShapeDtypeStruct) -> Array:
    return _gathered(table.astype(dtype))[tokens]


def _forward(table: Array, tokens: Array, dtype: jnp.dtype, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
    return _sorted_lookup(table, tokens, dtype, like), tokens


def _backward(dtype: jnp.dtype, like: jax.ShapeDtypeStruct, tokens: Array, dy: Array) -> tuple[Array, None]:
    across = [axes_of(axis) for axis, size in zip(TOKENS.values(), tokens.shape) if shards_of(axis, size) > 1]

    def own(rows: Array, tokens: Array) -> Array:
        sums = sums_by_token(rows.reshape(-1, rows.shape[-1]), tokens.reshape(-1), like.shape[0])
        return jax.lax.psum(sums, sum(across, ())) if across else sums

    sums = by_parts(own, {'rows': dy, 'tokens': tokens}, {'rows': 'b t d', 'tokens': 'b t'}, 'v d', TOKENS)
    # Of its part alone each device needs the sum. XLA exchanges no more than that where no other axis has tokens.
    return constrain(sums, 'vocab', 'embed').astype(like.dtype), None


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
