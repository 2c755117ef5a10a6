"""Whatever runs along the sequence: the kernels, on each device's own tokens, context parallel where the mesh says so.

Mixers call these in place of the kernels. Inside a step on a mesh (step.py enters it by
``jax.sharding.use_abstract_mesh``) each device runs its own rows, and with ``mesh.context`` > 1 its own part of every
sequence, by the kernels' context-parallel forms. Without a mesh, or where an axis does not divide the call, as when one
token is decoded, they are the plain kernels. Results are the same.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import adaptive_gain, context_parallel
from kernels_pallas.attention import attention as attention_kernel
from kernels_pallas.causal_conv1d import causal_conv1d as conv_kernel
from kernels_pallas.selective_scan import selective_scan as scan_kernel
from mixcon_jax.parallel.split import BATCH_AXES, SEQUENCE_AXIS, by_tokens, sequence_shards, token_axes


def selective_scan(
    u: Float[Array, 'b t d'],
    dt: Float[Array, 'b t d'],
    A: Float[Array, 'd n'],
    B: Float[Array, 'b t n'],
    C: Float[Array, 'b t n'],
    *,
    z: Float[Array, 'b t d'] | None = None,
    dt_softplus: bool = False,
    reset: Bool[Array, 'b t'] | None = None,
    prior: bool = False,
    implementation: str | None = None,
    chunk: int | None = None,
    keep_every: int | None = None,
    initial_state: Float[Array, 'b ...'] | None = None,
    process_noise: tuple | None = None,
    **options: Any,
) -> tuple:
    """``kernels_pallas.selective_scan``."""
    static: dict[str, Any] = {'dt_softplus': dt_softplus, 'prior': prior}
    static |= {'implementation': implementation, 'chunk': chunk, 'keep_every': keep_every}
    tokens = {'u': u, 'dt': dt, 'B': B, 'C': C, 'z': z, 'reset': reset}
    outputs = (True, False, True) if prior else (True, False)
    whole = {'A': A, 'process_noise': process_noise} | options
    return _run(
        scan_kernel,
        context_parallel.selective_scan,
        static,
        tokens,
        whole,
        outputs,
        rows={'initial_state': initial_state},
        own_rows=process_noise is None,  # which is drawn for all rows at once
    )


def matrix_gain(
    e: Float[Array, 'b t h p'],
    alpha: Float[Array, 'b t h'],
    log_decay: Float[Array, 'b t h'],
    *,
    reset: Bool[Array, 'b t'] | None = None,
    initial_gain: Float[Array, 'b h p p'] | None = None,
    chunk: int = 32,
) -> tuple[Float[Array, 'b t h p'], Float[Array, 'b h p p']]:
    """``kernels_pallas.adaptive_gain.matrix_gain``."""
    tokens = {'e': e, 'alpha': alpha, 'log_decay': log_decay, 'reset': reset}
    functions = adaptive_gain.matrix_gain, context_parallel.matrix_gain
    return _run(*functions, {'chunk': chunk}, tokens, {}, (True, False), rows={'initial_gain': initial_gain})


def diagonal_gain(
    e: Float[Array, 'b t h p'],
    alpha: Float[Array, 'b t h'],
    log_decay: Float[Array, 'b t h'],
    *,
    reset: Bool[Array, 'b t'] | None = None,
    initial_gain: Float[Array, 'b h p'] | None = None,
) -> tuple[Float[Array, 'b t h p'], Float[Array, 'b h p']]:
    """``kernels_pallas.adaptive_gain.diagonal_gain``."""
    tokens = {'e': e, 'alpha': alpha, 'log_decay': log_decay, 'reset': reset}
    functions = adaptive_gain.diagonal_gain, context_parallel.diagonal_gain
    return _run(*functions, {}, tokens, {}, (True, False), rows={'initial_gain': initial_gain})


def attention(
    q: Float[Array, 'b t h d'],
    k: Float[Array, 'b s k d'],
    v: Float[Array, 'b s k d'],
    *,
    segment_ids: Int[Array, 'b t'] | None = None,
    block_size: int = 256,
    **cache: Any,
) -> Float[Array, 'b t h d']:
    """``kernels_pallas.attention``; a call that reads a cache (``kv_segment_ids``, ``q_offset``) is not split."""
    if cache:
        return attention_kernel(q, k, v, segment_ids=segment_ids, block_size=block_size, **cache)
    tokens = {'q': q, 'k': k, 'v': v, 'segment_ids': segment_ids}
    return _run(attention_kernel, context_parallel.attention, {'block_size': block_size}, tokens, {}, True)


def causal_conv1d(
    x: Float[Array, 'b t c'],
    weight: Float[Array, 'k c'],
    bias: Float[Array, ' c'] | None = None,
    *,
    positions: Int[Array, 'b t'],
    mask: Bool[Array, 'b t'],
    initial_state: Float[Array, 'b l c'] | None = None,
    **options: Any,
) -> tuple[Float[Array, 'b t c'], Float[Array, 'b l c'] | None]:
    """``kernels_pallas.causal_conv1d``; returns no state, and may be split, where none is given."""
    if initial_state is not None:
        return conv_kernel(x, weight, bias, positions=positions, mask=mask, initial_state=initial_state, **options)
    longest = max(options.get('lags') or (weight.shape[0] - 1,))

    def plain(x, positions, weight, bias, past=None):
        y, _ = conv_kernel(x, weight, bias, positions=positions, initial_state=past, **options)
        return y

    def parallel(x, positions, weight, bias, axis_name):
        return plain(x, positions, weight, bias, context_parallel.previous(x, longest, axis_name))

    tokens = {'x': x, 'positions': positions}
    return _run(plain, parallel, {}, tokens, {'weight': weight, 'bias': bias}, True), None


def with_past(x: Float[Array, 'b t c'], length: int) -> Float[Array, 'b s l c']:
    """Cuts a sequence into the parts that lie on different devices, each with the ``length`` tokens before it.

    Returns:
      ``[B, S, length + T / S, C]``, S being ``sequence_shards(T)``; zeros before the first token.
    """
    if sequence_shards(x.shape[1]) == 1:
        return jnp.pad(x, ((0, 0), (length, 0), (0, 0)))[:, None]

    def local(x: Array) -> Array:
        past = context_parallel.previous(x, length, SEQUENCE_AXIS)
        return jnp.concatenate([past, x], axis=1)[:, None]

    return by_tokens(local, {'x': x}, {}, {}, True, token_axes(*x.shape[:2]))


def _run(
    kernel: Callable,
    parallel: Callable,
    static: Mapping[str, Any],
    tokens: Mapping[str, Any],
    whole: Mapping[str, Any],
    outputs: Any,
    rows: Mapping[str, Any] | None = None,
    own_rows: bool = True,
) -> Any:
    """Calls the kernel, or its context-parallel form, on each device's own tokens; arguments as in ``by_tokens``."""
    rows = rows or {}
    axes = token_axes(*next(iter(tokens.values())).shape[:2])
    if not own_rows:
        axes = tuple(axis for axis in axes if axis not in BATCH_AXES)
    if not axes:
        return kernel(**tokens, **rows, **whole, **static)
    function = partial(parallel, axis_name=SEQUENCE_AXIS) if SEQUENCE_AXIS in axes else kernel
    return by_tokens(partial(function, **static), tokens, rows, whole, outputs, axes)
