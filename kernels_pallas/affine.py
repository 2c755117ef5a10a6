"""Elementwise affine maps `x -> a x + b`, as pairs (a, b) for `jax.lax.associative_scan`."""

import jax

Map = tuple[jax.Array, jax.Array]


def compose(left: Map, right: Map) -> Map:
    """Returns the map that applies `left` first."""
    return left[0] * right[0], right[0] * left[1] + right[1]
