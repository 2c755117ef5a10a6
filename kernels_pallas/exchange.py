"""What shards of a sequence tell each other: affine maps of states, last states, last tokens.

All functions run inside `jax.shard_map`, manual over the axis named; shard i holds the i-th slice of the sequence.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AXIS = 'context'  # the mesh axis, unless another is named
METHODS = ('permute', 'gather')
GATHER_UP_TO = 4  # shards: one collective of six maps' bytes, where permutes are three rounds of four in all

Act = Callable[[jax.Array, jax.Array], jax.Array]  # (map, state) -> map applied to state
Compose = Callable[[jax.Array, jax.Array], jax.Array]  # (first, second) -> second after first


def begins_anew(call: Mapping[str, Any]) -> jax.Array | None:
    """Bool [B]: whether a row's state begins anew in this shard, by a call's `reset` at a token that its `mask` has."""
    reset, mask = call['reset'], call['mask']
    return None if reset is None else jnp.any(reset if mask is None else reset & mask, 1)


def entering_state(
    linear: jax.Array,
    constant: jax.Array,
    initial: jax.Array,
    *,
    act: Act,
    compose: Compose,
    axis_name: str,
    method: str | None = None,
) -> jax.Array:
    """The state before this shard's first token: `initial` carried through the maps of all shards before it.

    Shard i's slice takes a state x to `act(linear_i, x) + constant_i`. Memory and communication are of a few maps,
    however long the slices are.

    Args:
      linear: this shard's linear part.
      constant: this shard's final state from a state of zero.
      initial: the state before the whole sequence, the same on every shard.
      act, compose: the algebra of the linear parts.
      axis_name: the mesh axis that shares out the sequence.
      method: 'permute' (Hillis and Steele's scan, 1986: logarithmically many rounds, fewest bytes), 'gather' (one
        all-gather, every shard composes for itself) or None, which picks by the number of shards.

    Raises:
      ValueError: an unknown method.
    """
    shards, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    if method is None:
        method = 'gather' if 2 < shards <= GATHER_UP_TO else 'permute'
    if method not in METHODS:
        raise ValueError(f'context_parallel has no exchange {method!r}; available: {", ".join(METHODS)}')
    if shards == 1:
        return initial
    # The first shard's map needs no argument any more: prefixes of maps end in states.
    state = constant + jnp.where(index == 0, act(linear, initial), 0)
    if method == 'gather':
        linears, states = (lax.all_gather(x, axis_name) for x in (linear, state))
        entering = [initial, states[0]]
        for i in range(1, shards - 1):
            entering.append(act(linears[i], entering[-1]) + states[i])
        return lax.dynamic_index_in_dim(jnp.stack(entering), index, 0, keepdims=False)
    span, last = 1, shards - 1  # nobody asks for the last shard's map
    while span < last:
        # A shard that receives nothing receives zeros: its prefix, which starts at the first shard, is complete.
        hops = [(i, i + span) for i in range(last - span)]
        state = state + act(linear, lax.ppermute(state, axis_name, hops))
        if 2 * span < last:
            linear = compose(lax.ppermute(linear, axis_name, hops), linear)
        span *= 2
    shifted = lax.ppermute(state, axis_name, [(i, i + 1) for i in range(last)])
    return jnp.where(index == 0, initial, shifted)


def of_last_shard(x: jax.Array, axis_name: str) -> jax.Array:
    """The last shard's x, on every shard."""
    last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
    return lax.psum(jnp.where(last, x, 0), axis_name)


def previous(x: jax.Array, length: int, axis_name: str) -> jax.Array:
    """The `length` tokens before this shard's slice, [B, length, ...]; zero before the sequence starts.

    They may be those of several shards; each sends what is asked of it straight to where it is read.

    Args:
      x: this shard's tokens [B, T, ...].
      length: how many tokens, at least 0.
      axis_name: the mesh axis that shares out the sequence.
    """
    shards, tokens = lax.axis_size(axis_name), x.shape[1]
    parts: list[jax.Array] = []
    for hop in range(1, shards):
        wanted = min(length - (hop - 1) * tokens, tokens)
        if wanted <= 0:
            break
        hops = [(i, i + hop) for i in range(shards - hop)]
        parts.insert(0, lax.ppermute(x[:, tokens - wanted :], axis_name, hops))
    missing = length - sum(part.shape[1] for part in parts)
    zeros = jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype)
    return jnp.concatenate([zeros, *parts], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_tokens(x: jax.Array, axis_name: str) -> jax.Array:
    """The tokens [B, T, ...] of all shards, one after another along T; gradients are summed in at least float32."""
    return lax.all_gather(x, axis_name, axis=1, tiled=True)


def _gather_backward(axis_name: str, residuals: None, g: jax.Array) -> tuple[jax.Array]:
    del residuals
    wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return (lax.psum_scatter(wide, axis_name, scatter_dimension=1, tiled=True).astype(g.dtype),)


gather_tokens.defvjp(lambda x, axis_name: (gather_tokens(x, axis_name), None), _gather_backward)
