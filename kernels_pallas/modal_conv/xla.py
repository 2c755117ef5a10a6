"""`modal_conv` in plain XLA: chunks inside a `lax.scan`, each computed again by the backward pass."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import platform
from kernels_pallas.affine import compose
from kernels_pallas.modal_conv.reference import read, scan

STEPPED_CHUNK = 32
ASSOCIATIVE_CHUNK = 64


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
