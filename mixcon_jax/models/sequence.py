"""Whatever runs along the sequence: on one device as the kernels are, context parallel where the mesh splits tokens.

Mixers call these in place of the kernels. Inside a step on a mesh with ``mesh.context`` > 1 (step.py enters it by
``jax.sharding.use_abstract_mesh``) they get the kernels' context-parallel forms; without such a mesh, or where its axis
does not divide the tokens of the call, as when one token is decoded, the plain ones. Results are the same.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import adaptive_gain, context_parallel
from kernels_pallas import attention as attention_kernel
from kernels_pallas import causal_conv1d as conv_kernel
from kernels_pallas import selective_scan as scan_kernel
from mixcon_jax.mesh import SEQUENCE_AXIS, by_sequence, sequence_shards


def selective_scan(
    u: Float[Array, 'b t d'],
    dt: Float[Array, 'b t d'],
    A: Float[Array, 'd n'],
    B: Float[Array, 'b t n'],
    C: Float[Array, 'b t n'],
    *,
    reset: Bool[Array, 'b t'] | None = None,
    prior: bool = False,
    implementation: str | None = None,
    chunk: int | None = None,
    **options: Any,
) -> tuple:
    """``kernels_pallas.selective_scan``."""
    static = {'prior': prior, 'implementation': implementation, 'chunk': chunk}
    tokens = {'u': u, 'dt': dt, 'B': B, 'C': C, 'reset': reset}
    outputs = (True, False, True) if prior else (True, False)
    return _run(
        scan_kernel.selective_scan, context_parallel.selective_scan, static, tokens, {'A': A} | options, outputs
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
    whole = {'initial_gain': initial_gain}
    return _run(adaptive_gain.matrix_gain, context_parallel.matrix_gain, {'chunk': chunk}, tokens, whole, (True, False))


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
    return _run(
        adaptive_gain.diagonal_gain,
        context_parallel.diagonal_gain,
        {},
        tokens,
        {'initial_gain': initial_gain},
        (True, False),
    )


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
        return attention_kernel.attention(q, k, v, segment_ids=segment_ids, block_size=block_size, **cache)
    tokens = {'q': q, 'k': k, 'v': v, 'segment_ids': segment_ids}
    return _run(attention_kernel.attention, context_parallel.attention, {'block_size': block_size}, tokens, {}, True)


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
        return conv_kernel.causal_conv1d(
            x, weight, bias, positions=positions, mask=mask, initial_state=initial_state, **options
        )
    longest = max(options.get('lags') or (weight.shape[0] - 1,))

    def plain(x, positions, weight, bias, past=None):
        y, _ = conv_kernel.causal_conv1d(x, weight, bias, positions=positions, initial_state=past, **options)
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

    return by_sequence(local, {'x': x}, {}, True)


def _run(
    kernel: Callable,
    parallel: Callable,
    static: Mapping[str, Any],
    tokens: Mapping[str, Any],
    whole: Mapping[str, Any],
    outputs: Any,
) -> Any:
    """Calls the kernel, or its context-parallel form; ``tokens``, ``whole`` and ``outputs`` as in ``by_sequence``."""
    if sequence_shards(next(iter(tokens.values())).shape[1]) == 1:
        return kernel(**tokens, **whole, **static)
    return by_sequence(partial(parallel, axis_name=SEQUENCE_AXIS, **static), tokens, whole, outputs)
