"""Into the order of experts and back: tokens are gathered once on either way, and gradients are gathers, too.

A scatter adds up in the order in which a GPU's threads come, and XLA's gradient of a gather is one. Both directions are
permutations of (token, choice) pairs, known with their inverse, so that no sum is left to a scatter.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Order(NamedTuple):
    """The (token, choice) pairs sorted by expert, those of one expert by token, and those of no expert last.

    Attributes:
      pairs: [N * k] the pair, ``token * k + choice``, of each row.
      rows: [N, k] the row of each pair.
      group_sizes: [E] rows of each expert.
    """

    pairs: Int[Array, ' m']
    rows: Int[Array, 'n k']
    group_sizes: Int[Array, ' e']


def order(owner: Int[Array, 'n k'], num_experts: int) -> Order:
    """Sorts pairs by their expert; ``num_experts`` stands for none."""
    flat = owner.reshape(-1)
    pairs = jnp.argsort(flat, stable=True)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Order(pairs, jnp.argsort(pairs).reshape(owner.shape), group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(x: Float[Array, 'n d'], order: Order, partial: bool = False) -> Float[Array, 'm d']:
    """Each token's features at the rows of its pairs, [N * k, D].

    Args:
      x: one row a token.
      order: where its pairs are.
      partial: whether pairs may have no row, ``rows`` then being M or more, and rows no pair, ``pairs`` being N * k:
        such a row is 0.
    """
    return _take(x, order.pairs // order.rows.shape[1], partial)


def _dispatch_forward(x: Array, order: Order, partial: bool) -> tuple[Array, Order]:
    return dispatch(x, order, partial), order


def _dispatch_backward(partial: bool, order: Order, d_rows: Array) -> tuple[Array, None]:
    return _sum([_wide(_take(d_rows, rows, partial)) for rows in order.rows.T]).astype(d_rows.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine(
    rows: Float[Array, 'm d'], weights: Float[Array, 'n k'], order: Order, partial: bool = False
) -> Float[Array, 'n d']:
    """Each token's rows, weighted and added in the order of its choices in at least float32, [N, D] in rows' dtype."""
    by_choice = zip(order.rows.T, weights.T)
    terms = [_wide(_take(rows, of_choice, partial)) * weight[:, None] for of_choice, weight in by_choice]
    return _sum(terms).astype(rows.dtype)


def _combine_forward(rows: Array, weights: Array, order: Order, partial: bool) -> tuple[Array, Any]:
    return combine(rows, weights, order, partial), (rows, weights, order)


def _combine_backward(partial: bool, kept: tuple[Array, Array, Order], dy: Array) -> tuple[Array, Array, None]:
    rows, weights, order = kept
    weight_of_row = _take(weights.reshape(-1), order.pairs, partial)
    d_rows = _wide(_take(dy, order.pairs // weights.shape[1], partial)) * weight_of_row[:, None]
    d_weights = [jnp.sum(_wide(_take(rows, of_choice, partial)) * _wide(dy), axis=-1) for of_choice in order.rows.T]
    return d_rows.astype(rows.dtype), jnp.stack(d_weights, axis=1).astype(weights.dtype), None


combine.defvjp(_combine_forward, _combine_backward)


def _take(x: Array, index: Array, partial: bool) -> Array:
    """Rows by their index; one that x does not have is 0."""
    return x.at[index].get(mode='fill', fill_value=0) if partial else x[index]


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum(terms: list[Array]) -> Array:
    return functools.reduce(jnp.add, terms)
