"""`ssd` with one decay a head and step, for Hopper GPUs, in Pallas Mosaic: bfloat16 products, summed in float32.

Chunks of 64 tokens; a head's values are taken 64 at a time, and a kernel has one such slice, a "unit", in hand. `chain`
takes the state through the chunks, and the gradient's state through them from the other end; of each, what enters a
chunk is kept in bfloat16, as products take it. `gradients` then has all that it needs of a chunk: a block goes through
the units of a group, so that dB and dC are summed in registers, each by one owner: no atomics, and the same bits every
time.

Decays are powers of two of differences of sums from the chunk's start. A document's first token forgets all there is
by a decay of `2^-FORGET`, which is 0 in float32, and no token forgets more: so sums stay below 2^14, and what their
rounding costs below what bfloat16's does.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import platform
from kernels_pallas.ssd.mosaic_gpu.chain import chain
from kernels_pallas.ssd.mosaic_gpu.gradients import VECTORS, gradients
from kernels_pallas.ssd.mosaic_gpu.tiles import CHUNK, PART, Call

KEYS = (64, 128)
FORGET = 160.0
HOPPER = 9  # major compute capability
MOST = 2**31  # what indices of 32 bits can count
GRID = 65535  # blocks along all axes of a grid but the first
LOG2E = math.log2(math.e)


def unsupported(x: Any, log_decay: Any, B: Any, C: Any, exclusive: bool) -> str | None:
    """Why this cannot take a call on the device that is here, or None: of arrays, or of their shapes."""
    for name, value in (('x', x), ('B', B), ('C', C)):
        if value.dtype != jnp.bfloat16:
            return f'it takes bfloat16, {name} is {value.dtype.name}'
    if log_decay.ndim != 3:
        return 'it takes one decay a head and step, not one a key dimension'
    if log_decay.dtype != jnp.float32:
        return f'its sums are float32, those of this call {log_decay.dtype.name}'
    if exclusive:
        return 'its tokens read the state after them, not the one before'
    (batch, length, heads, width), (groups, keys) = x.shape, B.shape[2:]
    if keys not in KEYS or not width or width % PART:
        return f'it takes {KEYS[0]} or {KEYS[1]} keys and a multiple of {PART} values a head, not {keys} and {width}'
    if length < CHUNK:
        return f'it takes rows of at least {CHUNK} tokens, not {length}'
    padded = length + -length % CHUNK
    if batch * max(padded * max(heads, groups), padded // CHUNK * heads * width) >= MOST:
        return f'indices of 32 bits cannot count the tokens and heads of x, {x.shape}'
    if max(batch, padded // CHUNK) > GRID:
        return f'a GPU counts {GRID} rows, and chunks of {CHUNK} tokens, not those of {x.shape}'
    capability = platform.compute_capability()
    if capability is None:
        return 'it needs an NVIDIA GPU'
    if capability[0] != HOPPER:
        return f'it is for GPUs of compute capability {HOPPER}.x, this one has {capability[0]}.{capability[1]}'
    return None


def variants(keys: int) -> tuple[str, ...]:
    """The programs that a call runs, by the names of their cards."""
    return (f'keys{keys}',)


def ssd(x, log_decay, B, C, step, reset, initial_state, interpret=None):
    """Output and final state of `api.ssd`; shapes as there.

    Args:
      x: [B, T, H, P], bfloat16, P a multiple of `PART`.
      log_decay: float32 [B, T, H].
      B, C: [B, T, G, N], bfloat16, N of `KEYS`.
      step: float32 [B, T, H]; None for 1.
      reset: bool [B, T] or None.
      initial_state: float32 [B, H, P, N].
      interpret: parameters of Mosaic's interpreter, to run on a CPU; None compiles.
    """
    length = x.shape[1]
    decay = jnp.maximum(log_decay * LOG2E, -FORGET)
    if reset is not None:
        decay = jnp.where(reset[..., None], -FORGET, decay)
    step = jnp.ones_like(decay) if step is None else step
    behind = -length % CHUNK  # tokens that neither decay nor add anything
    pad = lambda value: jnp.pad(value, ((0, 0), (0, behind)) + ((0, 0),) * (value.ndim - 2)) if behind else value
    y, final = _padded(*map(pad, (x, decay, B, C, step)), initial_state, interpret)
    return y[:, :length], final


def _call(x, B, interpret):
    return Call(*x.shape, *B.shape[2:], interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _padded(x, decay, B, C, step, initial, interpret):
    """`ssd` of whole chunks, of decays to the base of two, of which none forgets more than `FORGET`."""
    y, final, _ = _forward_chain(x, decay, B, C, step, initial, interpret, keep=False)
    return y, final


def _forward(x, decay, B, C, step, initial, interpret):
    y, final, states = _forward_chain(x, decay, B, C, step, initial, interpret, keep=True)
    return (y, final), (x, decay, B, C, step, states)


def _forward_chain(x, decay, B, C, step, initial, interpret, keep):
    call = _call(x, B, interpret)
    arrays = {'values': _flat(x), 'keys': _flat(B), 'queries': _flat(C), 'sums': _sums(decay), 'step': _by_head(step)}
    y, final, states = chain(call, arrays, initial.reshape(-1, call.keys), keep)
    return y.reshape(x.shape), final.reshape(initial.shape), states


def _backward(interpret, residuals, cotangents):
    x, decay, B, C, step, states = residuals
    dy, dfinal = cotangents
    call = _call(x, B, interpret)
    arrays = {'queries': _flat(C), 'keys': _flat(B), 'dy': _flat(dy), 'x': _flat(x), 'entering': states}
    arrays |= {'sums': _sums(decay), 'step': _by_head(step)}
    turned = {'values': arrays['dy'], 'keys': arrays['queries'], 'sums': arrays['sums']}
    _, dinitial, arrays['leaving'] = chain(call, turned, dfinal.reshape(-1, call.keys), keep=True)
    found = gradients(call, arrays)
    # A head's sums over its slices of values, [B, H, chunks, CHUNK].
    split = lambda value: value.reshape(call.batch, call.heads, -1, call.chunks, CHUNK).sum(2)
    later, across, strict, added, dstep = (split(found[name]) for name in VECTORS)
    by_chunk = lambda value: value.reshape(call.batch, call.heads, call.chunks, CHUNK)
    sums, steps = by_chunk(arrays['sums']), by_chunk(arrays['step'])
    # A token's decay is in all pairs of one before it, or the state that enters, and one not before it, or the state
    # that leaves.
    ahead = jnp.flip(jnp.cumsum(jnp.flip(later - steps * strict, -1), -1), -1)
    passed = jnp.cumsum(steps * added, -1) - steps * added
    whole = jnp.exp2(sums[..., -1:]) * across.sum(-1, keepdims=True)
    to_tokens = lambda value: jnp.moveaxis(value.reshape(call.batch, call.heads, -1), 1, 2)
    return (
        found['dx'].reshape(x.shape),
        to_tokens((ahead + passed + whole) / LOG2E),
        found['dkeys'].reshape(B.shape),
        found['dqueries'].reshape(C.shape),
        to_tokens(dstep),
        dinitial.reshape(call.batch, call.heads, call.width, call.keys),
    )


_padded.defvjp(_forward, _backward)


def _flat(value: jax.Array) -> jax.Array:
    return value.reshape(value.shape[0] * value.shape[1], -1)


def _by_head(value: jax.Array) -> jax.Array:
    """[B, T, H] as flat [B, H, T]."""
    return jnp.moveaxis(value, 2, 1).reshape(-1)


def _sums(decay: jax.Array) -> jax.Array:
    """Sums from the chunk's start, each token's own decay included, flat [B, H, T]."""
    return jnp.cumsum(_by_head(decay).reshape(-1, CHUNK), 1).reshape(-1)
