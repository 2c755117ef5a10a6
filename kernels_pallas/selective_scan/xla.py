"""Selective scan in plain XLA: whole-sequence `associative_scan`, and rematerialised chunks inside a `lax.scan`.

Chunks keep only the state between them; the backward pass recomputes a chunk's states. Inside a chunk a wide device
takes an associative scan, a CPU a few unrolled steps, where the state stays in cache.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.selective_scan.reference import Inputs, Options, Outputs, token_noise

CPU_CHUNK = 8
WIDE_CHUNK = 64


def _decay_input(inputs: Inputs, options: Options, time: jax.Array):
    """Transition and input of every token [..., D, N]; one chunk's tokens lie on axis 1, `time` their indices."""
    dt = inputs.dt[..., None]
    decay = jnp.exp(dt * inputs.A)
    if inputs.reset is not None:
        decay = jnp.where(inputs.reset[..., None, None], 0, decay)
    drive = (inputs.dt * inputs.u)[..., None] * inputs.B[:, :, None, :]
    if options.noise_key is not None:
        shape = drive.shape[:1] + drive.shape[2:]
        noise = jax.vmap(lambda t: token_noise(options, t, shape, drive.dtype), out_axes=1)(time)
        drive = drive + jnp.where(dt > 0, noise, 0)
    return decay, drive


def _combine(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]


def _combine_pair(left, right):
    """Composes 2x2 affine maps held as tuples of elementwise arrays: (m00, m01, m10, m11, v0, v1)."""
    a, b, c, d, p, q = left
    e, f, g, h, r, s = right
    return e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d, e * p + f * q + r, g * p + h * q + s


def _states(inputs: Inputs, options: Options, time: jax.Array):
    """All states of the tokens given: (x [B, T, D, N], decayed past [B, T, D, N], final state)."""
    decay, drive = _decay_input(inputs, options, time)
    if options.delay is None:
        first = drive[:, :1] + decay[:, :1] * inputs.initial_state[:, None]
        _, x = lax.associative_scan(_combine, (decay, jnp.concatenate([first, drive[:, 1:]], 1)), axis=1)
        return x, x - drive, x[:, -1]
    # (x_k, x_{k-1}) evolves by a companion matrix: exact, as one tap is linear in the state.
    m = options.delay[:, None]
    keep = jnp.ones_like(decay) if inputs.reset is None else jnp.where(inputs.reset[..., None, None], 0.0, 1.0)
    live = jnp.broadcast_to((inputs.dt > 0)[..., None], decay.shape)
    keep = jnp.broadcast_to(keep, decay.shape).astype(decay.dtype)
    zero = jnp.zeros_like(decay)
    matrices = (
        jnp.where(live, decay * (1 - m), keep), jnp.where(live, decay * m, 0),
        jnp.where(live, keep, 0), jnp.where(live, 0, keep),
    )  # fmt: skip
    newest, older = inputs.initial_state[:, 0], inputs.initial_state[:, 1]
    a, b, c, d = (v[:, 0] for v in matrices)
    first = jnp.stack([a * newest + b * older + drive[:, 0], c * newest + d * older], 0)
    p = jnp.concatenate([first[0][:, None], drive[:, 1:]], 1)
    q = jnp.concatenate([first[1][:, None], zero[:, 1:]], 1)
    *_, x, previous = lax.associative_scan(_combine_pair, (*matrices, p, q), axis=1)
    return x, x - drive, jnp.stack([x[:, -1], previous[:, -1]], 1)


def _read(x: jax.Array, C: jax.Array, options: Options) -> jax.Array:
    """Outputs [B, T, D] of states [B, T, D, N]; `s + s F^T` is read by folding F into C."""
    if options.Z is not None:
        x = x * jax.nn.silu(jnp.einsum('btdn,mn->btdm', x, options.Z) + options.g)
    if options.F is not None:
        C = C + jnp.einsum('btm,mn->btn', C, options.F)
    return jnp.einsum('btdn,btn->btd', x, C)


def associative(inputs: Inputs, options: Options, time: jax.Array | None = None) -> Outputs:
    """One associative scan over the whole sequence: log depth, but several [B, T, D, N] buffers."""
    time = jnp.arange(inputs.u.shape[1]) if time is None else time
    x, carried, final_state = _states(inputs, options, time)
    prior = jnp.einsum('btdn,btn->btd', carried, inputs.C) if options.prior else None
    return Outputs(_read(x, inputs.C, options), final_state, prior)


def chunked(inputs: Inputs, options: Options, chunk: int | None = None) -> Outputs:
    chunk = chunk or WIDE_CHUNK
    length = inputs.u.shape[1]
    chunk = min(chunk, length)
    steps = -(-length // chunk)
    pad = steps * chunk - length

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], steps, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(state, tokens):
        start, parts = tokens
        part = inputs._replace(initial_state=state, **parts)
        out = associative(part, options, start + jnp.arange(chunk))
        return out.final_state, (out.y, out.prior)

    names = ['u', 'dt', 'B', 'C'] + (['reset'] if inputs.reset is not None else [])
    parts = {name: split(getattr(inputs, name)) for name in names}
    final_state, ys = lax.scan(body, inputs.initial_state, (jnp.arange(steps) * chunk, parts))
    merge = lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], steps * chunk, -1)[:, :length]
    y, prior = jax.tree.map(merge, ys)
    return Outputs(y, final_state, prior)
