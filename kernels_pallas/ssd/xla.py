"""`ssd` in plain XLA: chunks of matrix products inside a `lax.scan`, each computed again by the backward pass.

Only states between chunks are kept. Exponents are sums of log decays from one token to a later one, never positive:
taken as differences of sums from the chunk's start, those are sums of two numbers each, or a token that forgets much
would cost the digits of all that follow it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import platform

CHUNK = 64
TOGETHER = 1024  # tokens whose chunks a GPU computes together
BLOCK = 16  # tokens whose decays by key dimension are written out pair by pair
FORGOTTEN = -1e30  # a log decay of nothing left; finite, so that no gradient becomes nan


class _Tokens(NamedTuple):
    """Tokens of rows, C of them each: heads are [G, R], groups and heads a group."""

    x: Any  # [B, C, G, R, P]
    log_decay: Any  # [B, C, G, R] or [B, C, G, R, N]
    B: Any  # [B, C, G, N]
    C: Any
    step: Any  # [B, C, G, R] or None
    document: Any  # int [B, C], counts the resets from the row's start; or None


def chunked(x, log_decay, B, C, step, reset, initial_state, exclusive, chunk):
    """Output and final state of `api.ssd`; shapes as there."""
    (batch, length, heads, width), groups = x.shape, B.shape[2]
    chunk = min(chunk, length)
    count = -(-length // chunk)
    rounds = -(-count // chunks_together(length, chunk))
    together = -(-count // rounds)  # as many in every round
    by_group = lambda value: None if value is None else value.reshape(batch, length, groups, -1, *value.shape[3:])
    # A document's number in its row: tokens of one number see one another, and those of 0 the initial state.
    document = None if reset is None else jnp.cumsum(reset, 1, dtype=jnp.int32)
    tokens = _Tokens(by_group(x), by_group(log_decay), B, C, by_group(step), document)
    state = initial_state.reshape(batch, groups, heads // groups, width, -1), jnp.zeros(batch, jnp.int32)
    behind = (0, rounds * chunk * together - length)

    def split(value):
        mode = 'edge' if value is document else 'constant'  # padding goes on with the last document
        padded = jnp.pad(value, ((0, 0), behind) + ((0, 0),) * (value.ndim - 2), mode=mode)
        return jnp.moveaxis(padded.reshape(batch, rounds, chunk * together, *value.shape[2:]), 1, 0)

    one, given = partial(_round, chunk, exclusive), jax.tree.map(split, tokens)
    if count > 1:
        one = jax.checkpoint(one, prevent_cse=rounds == 1)
    if rounds == 1:
        state, y = one(state, jax.tree.map(lambda value: value[0], given))
        y = y[None]
    else:
        state, y = lax.scan(one, state, given)
    y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, heads, width)[:, :length]
    return y, state[0].reshape(initial_state.shape)


def chunks_together(length: int, chunk: int) -> int:
    """Chunks of a round: on a GPU many, whose launches would otherwise cost more than their work; elsewhere one."""
    most = max(1, TOGETHER // chunk) if platform.platform() == 'gpu' else 1
    return min(most, -(-length // chunk))


def _round(chunk, exclusive, carry, tokens: _Tokens):
    """Some chunks: the state and the number of the document after them, and their outputs."""
    state, before = carry
    narrow, wide, (batch, length) = tokens.x.dtype, state.dtype, tokens.x.shape[:2]
    fold = lambda value: value.reshape(batch * (length // chunk), chunk, *value.shape[2:])
    unfold = lambda value: jnp.moveaxis(value.reshape(batch, -1, *value.shape[1:]), 1, 0)
    if tokens.document is None:
        previous = None
    else:
        ends = tokens.document[:, chunk - 1 :: chunk]
        previous, before = jnp.concatenate([before[:, None], ends[:, :-1]], 1).reshape(-1), ends[:, -1]
    within, queries, kept, added = _inside(jax.tree.map(fold, tokens), previous, exclusive, wide)
    turn = lambda state, change: (change[0] * state + change[1], state)
    state, entering = lax.scan(turn, state, (unfold(kept), unfold(added)), unroll=True)
    entering = jnp.moveaxis(entering, 0, 1).reshape(-1, *state.shape[1:])
    y = within + product('btgrn,bgrpn->btgrp', queries, entering.astype(narrow), wide)
    return (state, before), y.reshape(batch, length, *y.shape[2:]).astype(narrow)


def _inside(tokens: _Tokens, before, exclusive, wide):
    """What chunks are without the state that enters them: a chunk a row, C tokens.

    Args:
      tokens: of the chunks.
      before: int [rows], the number of the document before each; or None.
      exclusive: whether a token reads the state before it.
      wide: type of sums.

    Returns:
      `(y [rows, C, G, R, P], queries [rows, C, G, R, N] to the entering state, the share of it that is kept
      [rows, G, R, 1, 1 or N], what is added [rows, G, R, P, N])`.
    """
    narrow = tokens.x.dtype
    sums = running(tokens.log_decay)
    total = jax.tree.map(lambda value: value[:, -1:], sums)
    read = jax.tree.map(behind, sums) if exclusive else sums  # up to the state that a token reads
    same = entering = leaving = None
    if tokens.document is not None:
        same = tokens.document[:, :, None] == tokens.document[:, None, :]
        entering = tokens.document == before[:, None]
        leaving = tokens.document == tokens.document[:, -1:]
    x, scores = tokens.x, _scores if tokens.log_decay.ndim == 4 else scores_by_key
    seen_by = visible(x.shape[1], same, exclusive)
    weights = scores(tokens.C, tokens.B, x.dtype, sums, read, seen_by)  # [rows, G, R, t, s]
    if tokens.step is not None:
        weights = weights * jnp.moveaxis(tokens.step, 1, -1)[..., None, :]
    within = product('bgrts,bsgrp->btgrp', weights.astype(narrow), x, wide)
    # What of the entering state a token sees, and what of each token is left at the end.
    seen, left = masked(between(read, None), entering), masked(between(total, sums), leaving)
    if tokens.step is not None:
        left = left * (tokens.step if tokens.log_decay.ndim == 4 else tokens.step[..., None])
    if tokens.log_decay.ndim == 4:
        seen, left = seen[..., None], left[..., None]
    queries = (tokens.C[:, :, :, None].astype(wide) * seen).astype(narrow)
    keys = (tokens.B[:, :, :, None].astype(wide) * left).astype(narrow)
    kept = jnp.exp(total[0] + total[1])[:, 0]
    kept = kept[..., None, None] if kept.ndim == 3 else kept[..., None, :]
    if tokens.document is not None:
        kept = jnp.where(_spread(entering[:, -1], kept.ndim), kept, 0)
    return within, queries, kept, product('bsgrp,bsgrn->bgrpn', x, keys, wide)


# ------------------------------------------------------------------------------------------------------- products
@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec, a, b, wide):
    """A product of two arrays of one type by `einsum`, summed and given in `wide`.

    Of arrays of bfloat16, its gradient rounds what comes back to bfloat16 as well: products of float32 with bfloat16
    are many times slower on a GPU.
    """
    if platform.platform() != 'gpu':  # XLA's CPU has no such product for every order of dimensions
        a, b = a.astype(wide), b.astype(wide)
    return jnp.einsum(spec, a, b, preferred_element_type=wide, precision='highest')


def _product_forward(spec, a, b, wide):
    return product(spec, a, b, wide), (a, b)


def _product_backward(spec, wide, kept, dy):
    (left, right, out), (a, b) = spec.replace('->', ',').split(','), kept
    dy = dy.astype(a.dtype)
    return (
        product(f'{out},{right}->{left}', dy, b, wide).astype(a.dtype),
        product(f'{out},{left}->{right}', dy, a, wide).astype(b.dtype),
    )


product.defvjp(_product_forward, _product_backward)


# ----------------------------------------------------------------------------------------------------- log decays
def running(log_decay):
    """Sums over the tokens from the chunk's start, itself included, each as a pair of numbers to be added."""
    below = jnp.tril(jnp.ones((log_decay.shape[1],) * 2, log_decay.dtype))
    sums = lambda value: jnp.einsum('ts,bs...->bt...', below, value, precision='highest')
    rough = lax.stop_gradient(sums(log_decay))
    return rough, sums(log_decay - (rough - behind(rough)))


def behind(value):
    """What the token before has, 0 for the first."""
    return jnp.pad(value, ((0, 0), (1, 0)) + ((0, 0),) * (value.ndim - 2))[:, :-1]


def between(later, earlier):
    """exp of the sum of log decays after the earlier token up to the later; None for the chunk's start."""
    if earlier is None:
        return jnp.exp(later[0] + later[1])
    return jnp.exp((later[0] - earlier[0]) + (later[1] - earlier[1]))


def _spread(mask, ndim):
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def masked(value, mask):
    return value if mask is None else jnp.where(_spread(mask, value.ndim), value, 0)


def visible(length, same, exclusive):
    """Bool [B or 1, t, s]: tokens of the same document up to the query itself, or up to the one before it."""
    causal = jnp.tril(jnp.ones((length, length), bool), -1 if exclusive else 0)[None]
    return causal if same is None else causal & same


def _pairs(read, sums, mask):
    """exp of the log decays between all pairs of tokens [B, t, s, ...], 0 where it is not visible."""
    exponent = sum(later[:, :, None] - earlier[:, None] for later, earlier in zip(read, sums, strict=True))
    return jnp.exp(jnp.where(_spread(mask, exponent.ndim), exponent, FORGOTTEN))


# --------------------------------------------------------------------------------------------------------- scores
def _scores(queries, keys, narrow, sums, read, mask):
    """C_t B_s times the decay between them, [B, G, R, t, s]: one product a group, as heads share it."""
    decay = _pairs(read, sums, mask)
    del narrow  # the type that they have
    return product('btgn,bsgn->bgts', queries, keys, decay.dtype)[:, :, None] * jnp.moveaxis(decay, (1, 2), (3, 4))


def scores_by_key(C, B, narrow, sums, read, mask):
    """`sum_n C_tn B_sn exp(decay between them)_n`, [B, G, R, t, s].

    Pairs within a block are written out. Between blocks it is a product of queries that have decayed since their
    block's start and keys that have till there, so that no exponent is positive (Yang et al., 2023, §4.3).
    """
    length, wide = C.shape[1], sums[0].dtype
    rows = []
    for start in range(0, length, BLOCK):
        own = slice(start, min(start + BLOCK, length))
        queries, keys = (value[:, own, :, None].astype(wide) for value in (C, B))
        inside, seen = (tuple(value[:, own] for value in pair) for pair in (sums, read))
        decay = _pairs(seen, inside, mask[:, own, own])
        row = [jnp.moveaxis(jnp.sum(queries[:, :, None] * keys[:, None] * decay, -1), (1, 2), (3, 4))]
        if start:
            border = tuple(value[:, start - 1 : start] for value in sums)
            before = tuple(value[:, :start] for value in sums)
            queries = (queries * between(seen, border)).astype(narrow)
            keys = (B[:, :start, :, None].astype(wide) * between(border, before)).astype(narrow)
            scores = product('btgrn,bsgrn->bgrts', queries, keys, wide)
            row.insert(0, jnp.where(mask[:, own, :start][:, None, None], scores, 0))
        empty = jnp.zeros((*row[0].shape[:-1], length - own.stop), wide)
        rows.append(jnp.concatenate([*row, empty], -1))
    return jnp.concatenate(rows, -2)


def decays_by_key(chunk: int) -> float:
    """About how many decays `scores_by_key` makes for a token and key dimension, in chunks of so many tokens.

    Those to the tokens of its block, and for each later block that to the border.
    """
    return min(BLOCK, chunk) + chunk / (2 * BLOCK)
