"""`modal_conv` in plain XLA: chunks inside a `lax.scan`, each computed again by the backward pass, or all at once."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import platform
from kernels_pallas.affine import compose
from kernels_pallas.long_conv.xla import BLOCK as SHORTEST
from kernels_pallas.long_conv.xla import within
from kernels_pallas.modal_conv.reference import poles as poles_of
from kernels_pallas.modal_conv.reference import read, scan, times

STEPPED_CHUNK = 32
ASSOCIATIVE_CHUNK = 64
PARALLEL_CHUNK = 64
FAR = 2**30  # further back than any token


def chunked(v, poles, residue, reset, mask, state, chunk=None, inner=None):
    """Output and final state of `api.modal_conv`; `inner` is 'stepped' or 'associative', None picks."""
    inner = inner or ('stepped' if platform.platform() == 'cpu' else 'associative')
    chunk = chunk or (STEPPED_CHUNK if inner == 'stepped' else ASSOCIATIVE_CHUNK)
    run = scan if inner == 'stepped' else _associative
    batch, length, _ = v.shape
    chunk = min(chunk, length)
    count = -(-length // chunk)
    if count == 1:
        return run(v, poles, residue, reset, mask, state)
    if count * chunk > length and mask is None:
        mask = jnp.ones((batch, length), bool)

    def split(x):
        padded = jnp.pad(x, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def one(state, tokens):
        y, state = run(tokens['v'], poles, residue, tokens.get('reset'), tokens.get('mask'), state)
        return state, y

    tokens = {name: split(x) for name, x in (('v', v), ('reset', reset), ('mask', mask)) if x is not None}
    state, y = lax.scan(jax.checkpoint(one, prevent_cse=False), state, tokens)
    return jnp.moveaxis(y, 0, 1).reshape(batch, count * chunk, -1)[:, :length], state


def _associative(v, poles, residue, reset, mask, state):
    """One chunk as an associative scan over maps of the states."""
    wave = lax.complex(*poles)
    decay = jnp.broadcast_to(wave, (*v.shape[:2], *wave.shape))
    drive = jnp.broadcast_to(v[:, :, None], decay.shape)
    if mask is not None:
        decay, drive = jnp.where(mask[..., None, None], decay, 1), jnp.where(mask[..., None, None], drive, 0)
    if reset is not None:
        start = reset if mask is None else reset & mask
        decay = jnp.where(start[..., None, None], 0, decay)
    drive = drive.astype(decay.dtype)
    drive = drive.at[:, 0].add(decay[:, 0] * lax.complex(state[:, 0], state[:, 1]))
    _, states = lax.associative_scan(compose, (decay, drive), axis=1)
    by_mode = jnp.moveaxis(jnp.stack([states.real, states.imag]), 3, 1)  # [2, S, B, T, D]
    return read(residue[:, :, None, None], by_mode), jnp.moveaxis(by_mode[:, :, :, -1], 2, 0)


def doubled(chunk):
    """Whether `within` knows chunks of so many tokens."""
    times_shortest, rest = divmod(chunk, SHORTEST)
    return not rest and times_shortest & (times_shortest - 1) == 0


def parallel(v, rate, angle, residue, reset, state=None, chunk=None):
    """Output and final state of `api.modal_conv` without a mask, by products: no states but those between chunks exist.

    Inside a chunk tokens add to each other by the filter's first values; what is before a chunk is in the states there.
    """
    batch, length, channels = v.shape
    chunk = chunk or PARALLEL_CHUNK
    before = -length % chunk  # zeros, which leave a state of zero as it is
    v = jnp.pad(v, ((0, 0), (before, 0), (0, 0)))
    index = jnp.arange(before + length)
    if reset is None:
        reach = jnp.full(v.shape[:2], FAR)
    else:  # how far back a token may read
        reset = jnp.pad(reset, ((0, 0), (before, 0)))
        reach = index - lax.cummax(jnp.where(reset, index, -FAR), axis=1)
    steps = lambda count: count[:, None, None].astype(v.dtype)
    waves = lambda count: jnp.moveaxis(poles_of(rate * steps(count), angle * steps(count)), 1, 0)  # [count, 2, S, D]
    places, signs = jnp.arange(chunk), jnp.asarray([1, -1], v.dtype)[:, None, None]
    exact = lax.Precision.HIGHEST

    taps = jnp.sum(waves(places) * residue * signs, (1, 2))
    y = within(v, taps, reach, chunk)

    by_chunk, reaches = v.reshape(batch, -1, chunk, channels), reach.reshape(batch, -1, chunk)
    last, ages = reaches[:, :, -1:], places[::-1]
    heard = jnp.where((ages <= last)[..., None], by_chunk, 0)
    drive = jnp.einsum('bncd,cwsd->bnwsd', heard, waves(ages), precision=exact)
    whole = waves(jnp.asarray([chunk]))[0]
    decay = jnp.where((last >= chunk)[..., None, None], whole, 0)
    if state is not None:  # before the first token of the row, which is in the first chunk, behind the zeros
        moved = times(waves(jnp.asarray([chunk - before]))[0][:, None], jnp.moveaxis(state, 1, 0))
        unbroken = (last[:, 0] >= chunk)[..., None, None]
        drive = drive.at[:, 0].add(jnp.where(unbroken, jnp.moveaxis(moved, 0, 1), 0))
    pair = lambda x: lax.complex(x[:, :, 0], x[:, :, 1])
    _, states = lax.associative_scan(compose, (pair(decay), pair(drive)), axis=1)
    states = jnp.stack([states.real, states.imag], 2)
    entering = jnp.pad(states[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    reading = jnp.moveaxis(_times(residue, waves(places + 1)), 1, 0) * signs
    carried = jnp.einsum('bnwsd,cwsd->bncd', entering, reading, precision=exact)
    y = y + jnp.where((reaches > places)[..., None], carried, 0).reshape(y.shape)
    if state is not None:
        carried = jnp.einsum('bwsd,cwsd->bcd', state, reading[: chunk - before], precision=exact)
        unbroken = reaches[:, 0, before:] > places[before:]
        y = y.at[:, before:chunk].add(jnp.where(unbroken[..., None], carried, 0))
    return y[:, before:], states[:, -1]


def _times(residue, waves):
    """R times waves [count, 2, S, D], as [2, count, S, D]."""
    return times(residue[:, None], jnp.moveaxis(waves, 1, 0))
