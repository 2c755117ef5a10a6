"""A matrix of two halves, of which every device needs its part of both."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mixcon_jax.parallel.layout import constrain
from mixcon_jax.parallel.split import axes_of, by_parts, shards_of


def halves(weight: Float[Array, 'd w'], axis: str) -> Float[Array, 'd 2 h']:
    """The halves `[D, 2, H]` of a matrix `[D, 2 H]`, split along H by the mesh axes of the logical axis ``axis``.

    Split along its columns, the matrix has one half on the first devices and the other on the last. Each device sends
    both parts of its own, once: XLA by itself would give all devices the whole.
    """
    both = weight.reshape(len(weight), 2, -1)
    shards = shards_of(axis, both.shape[2])
    if shards == 1:
        return both
    if shards % 2:  # the middle device has parts of both
        return constrain(both, 'embed', None, axis)
    exchanged = functools.partial(_exchanged, axes=axes_of(axis), shards=shards)
    return by_parts(exchanged, {'weight': weight}, {'weight': 'd w'}, 'd p w', {'w': axis})


def _exchanged(weight: Float[Array, 'd w'], axes: tuple[str, ...], shards: int) -> Float[Array, 'd 2 h']:
    """This device's part of both halves, of shards whose columns are consecutive.

    Device i < P / 2 holds parts 2 i and 2 i + 1 of the first half, device i + P / 2 those of the second. In the first
    round the first devices serve the even ones and the last devices the odd ones, in the second the others.
    """
    middle = shards // 2
    low, high = jnp.split(weight, 2, axis=1)
    is_first, is_even = lax.axis_index(axes) < middle, lax.axis_index(axes) % 2 == 0
    send = lambda x, odd: lax.ppermute(x, axes, [(i, 2 * (i % middle) + ((i >= middle) != odd)) for i in range(shards)])
    one = send(jnp.where(is_first, low, high), False)  # even devices get of the first half, odd ones of the second
    other = send(jnp.where(is_first, high, low), True)
    return jnp.stack([jnp.where(is_even, one, other), jnp.where(is_even, other, one)], axis=1)
