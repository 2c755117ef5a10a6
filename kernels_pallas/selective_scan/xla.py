"""Selective scan in plain XLA: whole-sequence `associative_scan`, and rematerialised chunks inside a `lax.scan`.

Chunks keep only the state between them; the backward pass recomputes a chunk's states. Inside a chunk a wide device
takes an associative scan, a CPU a few unrolled steps, where the state stays in cache.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import platform
from kernels_pallas.affine import compose
from kernels_pallas.selective_scan.reference import Inputs, Options, Outputs, token_noise

STEPPED_CHUNK = 8  # longer ones leave the cache and compile longer
ASSOCIATIVE_CHUNK = 64


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


def _combine_pair(left, right):
    """Composes 2x2 affine maps held as tuples of elementwise arrays: (m00, m01, m10, m11, v0, v1)."""
    a, b, c, d, p, q = left
    e, f, g, h, r, s = right
    return e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d, e * p + f * q + r, g * p + h * q + s


def _states(inputs: Inputs, options: Options, time: jax.Array):
    """All states of the tokens given: (x [B, T, D, N], decayed past [B, T, D, N], final state)."""
    decay, drive = _decay_input(inputs, options, time)
    if options.delay is None:
        entering = drive.at[:, 0].add(decay[:, 0] * inputs.initial_state)
        _, x = lax.associative_scan(compose, (decay, entering), axis=1)
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


def _steps(inputs: Inputs, options: Options, time: jax.Array) -> Outputs:
    """One chunk, written out token by token; the state is [N, B, D], its widest axis innermost.

    Unlike everywhere else, inputs.initial_state is already in that layout (with a leading slot axis for a delay).
    """
    A = jnp.transpose(inputs.A)[:, None]
    B, C = (jnp.transpose(x, (1, 2, 0))[..., None] for x in (inputs.B, inputs.C))  # [T, N, B, 1]
    read_C = C if options.F is None else C + jnp.einsum('tmbo,mn->tnbo', C, options.F)
    m = options.delay
    newest, older = (inputs.initial_state, None) if m is None else inputs.initial_state
    ys, priors = [], []
    for t in range(inputs.u.shape[1]):
        dt = inputs.dt[:, t]
        live = dt > 0
        decay = jnp.exp(dt * A)
        if inputs.reset is not None:
            decay = jnp.where(inputs.reset[:, t, None], 0, decay)
        if m is None:
            carried = decay * newest
        else:
            # A padded token shifts no slot; one that also resets still clears both.
            hold = jnp.where(live, 0, 1 if inputs.reset is None else ~inputs.reset[:, t, None]).astype(decay.dtype)
            carried = jnp.where(live, decay * (newest + m * (older - newest)), hold * newest)
            cleared = newest if inputs.reset is None else jnp.where(inputs.reset[:, t, None], 0, newest)
            older = jnp.where(live, cleared, hold * older)
        x = carried + (dt * inputs.u[:, t]) * B[t]
        if options.noise_key is not None:
            noise = token_noise(options, time[t], (*x.shape[1:], x.shape[0]), x.dtype)
            x = x + jnp.where(live, jnp.moveaxis(noise, -1, 0), 0)
        seen = x
        if options.Z is not None:
            scores = (options.Z @ x.reshape(x.shape[0], -1)).reshape(x.shape) + options.g[:, None, None]
            seen = x * jax.nn.silu(scores)
        ys.append(jnp.sum(seen * read_C[t], 0))
        if options.prior:
            priors.append(jnp.sum(carried * C[t], 0))
        if m is not None:
            # Each state feeds the next two: without the barrier XLA:CPU fuses both uses and recomputes whole chains.
            x, older = lax.optimization_barrier((x, older))
        newest = x
    state = newest if m is None else jnp.stack([newest, older])
    return Outputs(jnp.stack(ys, 1), state, jnp.stack(priors, 1) if options.prior else None)


def chunked(inputs: Inputs, options: Options, chunk: int | None = None, inner: str | None = None) -> Outputs:
    """Scans over chunks of `chunk` tokens; inner is 'stepped', 'associative' or None, which asks the platform."""
    inner = inner or ('stepped' if platform.platform() == 'cpu' else 'associative')
    length = inputs.u.shape[1]
    chunk = min(chunk or {'stepped': STEPPED_CHUNK, 'associative': ASSOCIATIVE_CHUNK}[inner], length)
    chunks = -(-length // chunk)
    padded = chunks * chunk  # the tail is padded with dt = 0, which leaves the state as it is

    def split(x):  # [B, T, ...] -> [chunks, B, chunk, ...]
        x = jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    # prevent_cse is for code outside a scan; inside one it only slows compilation.
    @partial(jax.checkpoint, prevent_cse=False)
    def body(state, tokens):
        index, parts = tokens
        part = inputs._replace(initial_state=state, **parts)
        y, state, prior = (_steps if inner == 'stepped' else associative)(part, options, index + jnp.arange(chunk))
        return state, (y, prior)

    state = inputs.initial_state
    if inner == 'stepped':
        state = jnp.moveaxis(state, (-1, 0), (-3, -2))  # [B, (2,) D, N] -> [(2,) N, B, D]
    names = ('u', 'dt', 'B', 'C') if inputs.reset is None else ('u', 'dt', 'B', 'C', 'reset')
    parts = {name: split(getattr(inputs, name)) for name in names}
    state, outputs = lax.scan(body, state, (jnp.arange(chunks) * chunk, parts))
    if inner == 'stepped':
        state = jnp.moveaxis(state, (-3, -2), (-1, 0))
    y, prior = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], padded, -1)[:, :length], outputs)
    return Outputs(y, state, prior)
