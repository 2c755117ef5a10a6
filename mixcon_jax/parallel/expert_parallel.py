"""Experts that several devices share: tokens travel to those that hold their experts, and back.

All functions run inside ``shard_map``, manual over the axes along which experts are split. Every device holds tokens
of its own and ``E / P`` consecutive experts. It sorts the (token, choice) pairs by the device that they go to, sends
each a part of them, runs its experts on what it gets, and returns every row to the place it came from.

Where room is short, a device's first tokens have it, those of the last are dropped: no token depends on a later one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mixcon_jax.parallel.experts import Order, combine, dispatch, order

AxisNames = tuple[str, ...]
Exchange = Callable[[Array], Array]  # rows as they were sent -> rows as they came, or the other way round
# (rows [M, D], those of one expert together; rows of each expert of this device) -> rows [M, O]
Run = Callable[[Array, Array], Array]
Keep = Callable[[Array], Array]


class Route(NamedTuple):
    """How this device's pairs travel.

    Attributes:
      order: the pairs of the rows that are sent, and the rows of pairs, as far as there is room for them.
      there: takes rows to the devices of their experts.
      back: takes rows of the same number and order as ``there`` gives to where they came from.
    """

    order: Order
    there: Exchange
    back: Exchange


def run(
    x: Float[Array, 'n d'],
    owner: Int[Array, 'n k'],
    weights: Float[Array, 'n k'],
    experts: Run,
    *,
    axes: AxisNames,
    num_experts: int,
    capacity: float = 0.0,
    method: str = 'padded',
    keep: Keep = lambda x: x,
) -> tuple[Float[Array, 'n o'], Bool[Array, 'n k']]:
    """The weighted sum of each token's experts.

    Args:
      x: this device's tokens.
      owner: the experts that each token chose, all different; ``num_experts`` stands for none.
      weights: of the choices.
      experts: runs the experts of this device; rows after its groups are to give 0.
      axes: mesh axes that split the experts.
      num_experts: of all devices together; these devices are to divide it.
      capacity: room for rows as a multiple of what an even load takes: of 'padded' between any two devices, of 'ragged'
        on the device that gets them. 0 is room for all that could come, so that none is dropped.
      method: 'padded' sends parts of equal size; 'ragged' as many rows as there are, which XLA:CPU cannot.
      keep: marks what the backward pass should not exchange again.

    Returns:
      `[N, O]`, and `[N, k]` whether each choice was taken: it has an expert, and found room.
    """
    shards, (tokens, choices) = lax.axis_size(axes), owner.shape
    local = num_experts // shards
    pairs = tokens * choices
    most = tokens * min(choices, local)  # that one device can send to another
    target = owner // local
    by_target = order(target, shards)
    if method == 'ragged':
        room = shards * most if not capacity else min(shards * most, _ceil(capacity * pairs))
        route = _ragged(by_target, target, room, axes)
    else:
        room = most if not capacity else min(most, _ceil(capacity * pairs / shards))
        route = _padded(by_target, target, room, axes)

    sent = dispatch(x, route.order, True)
    # None stays none: an index beyond all pairs is filled.
    expert = owner.reshape(-1).at[route.order.pairs].get(mode='fill', fill_value=num_experts)
    expert = jnp.where(expert < num_experts, expert % local + 1, 0)[:, None]  # 0 is what no row brings
    rows, expert = keep(route.there(sent)), route.there(expert)[:, 0] - 1
    by_expert = order(jnp.where(expert < 0, local, expert)[:, None], local)
    rows = experts(dispatch(rows, by_expert), by_expert.group_sizes)
    rows = combine(rows, jnp.ones((len(rows), 1), weights.dtype), by_expert)
    y = combine(keep(route.back(rows)), weights, route.order, True)
    return y, route.order.rows < len(route.order.pairs)


def _ceil(value: float) -> int:
    return max(1, -int(-value // 1))


def _padded(by_target: Order, target: Int[Array, 'n k'], room: int, axes: AxisNames) -> Route:
    """Parts of ``room`` rows between any two devices, by ``all_to_all``."""
    shards, pairs = len(by_target.group_sizes), by_target.rows.size
    starts = jnp.cumsum(by_target.group_sizes) - by_target.group_sizes
    place = by_target.rows - _of(starts, target)
    taken = (target < shards) & (place < room)
    rows = jnp.where(taken, target * room + place, shards * room)
    slot = jnp.arange(room)
    used = slot < by_target.group_sizes[:, None]
    found = by_target.pairs.at[starts[:, None] + slot].get(mode='fill', fill_value=pairs)
    sent = Order(jnp.where(used, found, pairs).reshape(-1), rows, jnp.minimum(by_target.group_sizes, room))

    def exchange(x: Array) -> Array:
        parts = x.reshape(shards, room, *x.shape[1:])
        return lax.all_to_all(parts, axes, split_axis=0, concat_axis=0).reshape(x.shape)

    return Route(sent, exchange, exchange)


def _ragged(by_target: Order, target: Int[Array, 'n k'], room: int, axes: AxisNames) -> Route:
    """As many rows as there are, ``room`` on the device that gets them, by ``ragged_all_to_all``."""
    (axis,) = axes
    pairs, me = by_target.rows.size, lax.axis_index(axis)
    asked = lax.all_gather(by_target.group_sizes, axis)  # [source, target]
    starts = jnp.cumsum(asked, axis=1) - asked  # in what each source sends
    granted = jnp.clip(room - (jnp.cumsum(asked, axis=0) - asked), 0, asked)
    offsets = jnp.cumsum(granted, axis=0) - granted  # in what each target gets
    place = by_target.rows - _of(starts[me], target)
    shards = len(by_target.group_sizes)
    taken = (target < shards) & (place < _of(granted[me], target))
    sent = Order(by_target.pairs, jnp.where(taken, by_target.rows, pairs), granted[me])
    # Where parts begin here, their sizes, where they begin there, and the sizes of those that come.
    there = (starts[me], granted[me], offsets[me], granted[:, me])
    back = (offsets[:, me], granted[:, me], starts[:, me], granted[me])
    return Route(
        sent,
        lambda x: _ragged_exchange(x, there, back, room, axis),
        lambda x: _ragged_exchange(x, back, there, pairs, axis),
    )


def _ragged_exchange(x: Array, there: tuple, back: tuple, rows: int, axis: str) -> Array:
    """Sends parts of x to other devices; the result has so many rows, 0 where none comes."""
    send = lambda x, parts, rows: lax.ragged_all_to_all(
        x, jnp.zeros((rows, *x.shape[1:]), x.dtype), *parts, axis_name=axis
    )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return send(x, there, rows)

    @jax.custom_vjp
    def exchange(x: Array, there: tuple, back: tuple) -> Array:
        return send(x, there, rows)

    exchange.defvjp(
        lambda x, there, back: (exchange(x, there, back), (there, back)),
        lambda parts, dy: (send(dy, parts[1], len(x)), None, None),
    )
    return exchange(x, there, back)


def _of(values: Int[Array, ' p'], target: Int[Array, 'n k']) -> Int[Array, 'n k']:
    """The value of each target; of none, the last one's, which nobody reads."""
    return values[jnp.minimum(target, len(values) - 1)]
