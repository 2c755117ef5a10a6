"""`wkv` in plain XLA: chunks inside a `lax.scan`, each computed again by the backward pass."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import platform
from kernels_pallas.wkv.reference import EMPTY, State, chosen, joined, nothing, of_token, scan

STEPPED_CHUNK = 32
ASSOCIATIVE_CHUNK = 512  # a launch costs a GPU more than the tree that is deeper


def chunked(k, v, decay, bonus, reset, mask, state, chunk=None, inner=None):
    """Output and final state of `api.wkv`; `inner` is 'stepped' or 'associative', None picks for the platform."""
    inner = inner or ('stepped' if platform.platform() == 'cpu' else 'associative')
    chunk = chunk or (STEPPED_CHUNK if inner == 'stepped' else ASSOCIATIVE_CHUNK)
    run = _stepped if inner == 'stepped' else _associative
    batch, length, _ = k.shape
    chunk = min(chunk, length)
    count = -(-length // chunk)
    if count * chunk > length and mask is None:
        mask = jnp.ones((batch, length), bool)
    tokens = {'k': k, 'v': v} | {name: x for name, x in (('reset', reset), ('mask', mask)) if x is not None}
    if count == 1:
        one = lambda state, tokens: run(state, tokens, decay, bonus)
        state, y = (jax.checkpoint(one) if inner == 'associative' else one)(state, tokens)
        return y, state

    def split(x):
        padded = jnp.pad(x, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    one = jax.checkpoint(lambda state, tokens: run(state, tokens, decay, bonus), prevent_cse=False)
    state, y = lax.scan(one, state, {name: split(x) for name, x in tokens.items()})
    return jnp.moveaxis(y, 0, 1).reshape(batch, count * chunk, -1)[:, :length], state


def _stepped(state: State, tokens, decay, bonus):
    """One chunk as a loop over its tokens: written out, eight compiled and ran several times as long on a CPU."""
    y, final = scan(tokens['k'], tokens['v'], decay, bonus, tokens.get('reset'), tokens.get('mask'), state)
    return final, y


def _associative(state: State, tokens, decay, bonus):
    """One chunk as an associative scan over maps of the state: what it decays by, and what it adds."""
    k, v = tokens['k'], tokens['v']
    log_decay, own = jnp.broadcast_to(-decay, k.shape), of_token(k, v)
    if (mask := tokens.get('mask')) is not None:
        log_decay = jnp.where(mask[..., None], log_decay, 0)
        own = chosen(mask[..., None], own, nothing(k.shape, k.dtype))
    if (reset := tokens.get('reset')) is not None:
        log_decay = jnp.where(reset[..., None], EMPTY, log_decay)

    def then(first, second):
        return first[0] + second[0], joined(first[1], second[0], second[1])

    entering = jax.tree.map(lambda x: x[:, None], (jnp.zeros_like(state[0]), state))
    maps = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), entering, (log_decay, own))
    _, states = lax.associative_scan(then, maps, axis=1)
    before: State = (states[0][:, :-1], states[1][:, :-1], states[2][:, :-1])
    if reset is not None:
        before = chosen(reset[..., None], nothing(k.shape, k.dtype), before)
    numerator, denominator, _ = joined(before, jnp.zeros_like(decay), of_token(k + bonus, v))
    return tuple(x[:, -1] for x in states), numerator / denominator
