"""The selective scan's one entry point: checks shapes, picks an implementation, adds the skip."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.selective_scan import reference, xla
from kernels_pallas.selective_scan.reference import Inputs, Options, Outputs

IMPLEMENTATIONS = ('reference', 'associative', 'chunked', 'chunked_stepped', 'chunked_associative')


def selective_scan(
    u: Float[Array, 'b t d'],
    dt: Float[Array, 'b t d'],
    A: Float[Array, 'd n'],
    B: Float[Array, 'b t n'],
    C: Float[Array, 'b t n'],
    *,
    D: Float[Array, ' d'] | None = None,
    reset: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b ...'] | None = None,
    readout: tuple | None = None,
    delay: Float[Array, ' d'] | None = None,
    process_noise: tuple | None = None,
    prior: bool = False,
    implementation: str | None = None,
    chunk: int | None = None,
) -> tuple:
    """Runs `x_k = exp(dt_k A) x_{k-1} + dt_k u_k B_k`, `y_k = x_k C_k + D u_k` over time, for every channel.

    Source: Mamba (S6) with zero-order-hold decay and Euler input; the options are those of MixCon's Conba, equations 6,
    7 and 13 (docs/conba.md). Everything is computed in float32, or in float64 if any of u, dt, A, B, C is float64.

    Args:
      u: input [B, T, D], any float type, T >= 1.
      dt: step sizes [B, T, D], >= 0. A channel with dt = 0 (padding) leaves its state as it is: no decay, no input, no
        noise, no shift of the delay's slots.
      A: negative decay rates [D, N].
      B, C: input and output maps [B, T, N].
      D: skip [D]; y gains `D * u`.
      reset: bool [B, T]; the state is zero before a token where it is True (the start of a document).
      initial_state: [B, D, N], or [B, 2, D, N] with `delay` (slot 0 the newest); zeros if None. Differentiable.
      readout: `(Z [N, N], g [N], F [N, N] or None)`: y reads `s + s F^T` with `s = x * swish(x Z^T + g)` in place of x.
        `(None, None, F)` reads `x + x F^T`. The states of more than a chunk never exist at once.
      delay: m [D] in (0, 1): the recurrence decays `(1 - m) x_{k-1} + m x_{k-2}` in place of x_{k-1}.
      process_noise: `(key, std)`: adds `std * normal` to every state at every token with dt > 0. Drawn inside, from the
        key folded with the token's index: the same for every implementation and chunk. `(key, std, start)` counts from
        start, which a call on a later part of a sequence needs to draw what one call on the whole draws.
      prior: also return the a-priori outputs `(exp(dt_k A) x_{k-1}) C_k`, without skip and without `readout`.
      implementation: None picks for the platform; 'reference' (sequential), 'associative' (whole-sequence
        associative scan, memory O(T D N)) or 'chunked' (rematerialised chunks). A chunk is stepped on CPU and scanned
        associatively elsewhere, by JAX's default backend; 'chunked_stepped' and 'chunked_associative' say which.
      chunk: tokens a chunk of 'chunked'; None picks for the platform.

    Returns:
      `(y [B, T, D], final_state)`, with `prior=True` also the a-priori outputs [B, T, D]; final_state has
      initial_state's shape and continues the scan when passed as initial_state of a later call.

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist.
    """
    inputs, options = _check(u, dt, A, B, C, reset, initial_state, readout, delay, process_noise, prior)
    if D is not None:
        _expect('D', D, (u.shape[2],))
    if chunk is not None and chunk < 1:
        raise ValueError(f'chunk must be at least 1, got {chunk}')
    y, final_state, prior_y = _implementation(implementation, chunk)(inputs, options)
    if D is not None:
        y = y + D.astype(y.dtype) * inputs.u
    return (y, final_state, prior_y) if prior else (y, final_state)


def _implementation(name: str | None, chunk: int | None) -> Callable[[Inputs, Options], Outputs]:
    inner = {None: None, 'chunked': None, 'chunked_stepped': 'stepped', 'chunked_associative': 'associative'}
    if name in inner:
        return lambda inputs, options: xla.chunked(inputs, options, chunk, inner[name])
    if name == 'reference':
        return reference.scan
    if name == 'associative':
        return xla.associative
    raise ValueError(f'selective_scan has no implementation {name!r}; available here: {", ".join(IMPLEMENTATIONS)}')


def _expect(name: str, value: jax.Array, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f'selective_scan: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}')


def _check(u, dt, A, B, C, reset, initial_state, readout, delay, process_noise, prior) -> tuple[Inputs, Options]:
    if u.ndim != 3 or u.shape[1] < 1:
        raise ValueError(f'selective_scan: u has shape {tuple(u.shape)}, expected [batch, time >= 1, channels]')
    if A.ndim != 2:
        raise ValueError(f'selective_scan: A has shape {tuple(A.shape)}, expected [channels, states]')
    (batch, length, channels), states = u.shape, A.shape[1]
    for name, value, shape in (
        ('dt', dt, (batch, length, channels)),
        ('A', A, (channels, states)),
        ('B', B, (batch, length, states)),
        ('C', C, (batch, length, states)),
        ('reset', reset, (batch, length)),
        ('delay', delay, (channels,)),
    ):
        if value is not None:
            _expect(name, value, shape)
    Z, g, F = readout or (None, None, None)
    if (Z is None) != (g is None):
        raise ValueError('selective_scan: readout needs Z and g together, or neither')
    for name, value, shape in (
        ('readout Z', Z, (states, states)),
        ('readout g', g, (states,)),
        ('readout F', F, (states, states)),
    ):
        if value is not None:
            _expect(name, value, shape)
    state_shape = (batch, channels, states) if delay is None else (batch, 2, channels, states)
    dtype = jnp.promote_types(jnp.result_type(u, dt, A, B, C), jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, dtype)
    _expect('initial_state', initial_state, state_shape)
    key, std, *start = process_noise if process_noise is not None else (None, None)
    cast = lambda x: None if x is None else jnp.asarray(x, dtype)
    reset = None if reset is None else reset.astype(bool)
    inputs = Inputs(cast(u), cast(dt), cast(A), cast(B), cast(C), reset, cast(initial_state))
    return inputs, Options(cast(Z), cast(g), cast(F), cast(delay), key, cast(std), prior, *start)
