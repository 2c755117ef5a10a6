"""The selective scan's one entry point: checks shapes, picks an implementation, adds the skip."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.call import fitted, sizes
from kernels_pallas.dispatch import Candidate, choose
from kernels_pallas.selective_scan import mosaic_gpu, reference, scaled_mosaic_gpu, xla
from kernels_pallas.selective_scan.reference import Inputs, Options, Outputs

PADDED_DT = mosaic_gpu.PADDED_DT
WORDS = {'b': 'batch', 't': 'time >= 1', 'd': 'channels', 'n': 'states'}


def selective_scan(
    u: Float[Array, 'b t d'],
    dt: Float[Array, 'b t d'],
    A: Float[Array, 'd n'],
    B: Float[Array, 'b t n'],
    C: Float[Array, 'b t n'],
    *,
    D: Float[Array, ' d'] | None = None,
    z: Float[Array, 'b t d'] | None = None,
    dt_bias: Float[Array, ' d'] | None = None,
    dt_softplus: bool = False,
    reset: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b *slots d n'] | None = None,
    readout: tuple | None = None,
    delay: Float[Array, ' d'] | None = None,
    process_noise: tuple | None = None,
    prior: bool = False,
    implementation: str | None = None,
    chunk: int | None = None,
    keep_every: int | None = None,
) -> tuple:
    """Runs `x_k = exp(dt_k A) x_{k-1} + dt_k u_k B_k`, `y_k = x_k C_k + D u_k` over time, for every channel.

    Source: Mamba (S6) with zero-order-hold decay and Euler input; the options are those of MixCon's Conba, equations 6,
    7 and 13 (docs/conba.md). Everything is computed in float32, or in float64 if any of u, dt, A, B, C is float64.
    No token's result depends on another row or channel: under `jax.shard_map` over batch and channels (u, dt, z, y by
    both; A, D, dt_bias by channels; B, C, reset by batch) it needs no communication. Pass `check_vma=False` there, as
    loops and kernels do not follow what differs between devices.

    Args:
      u: input [B, T, D], any float type, T >= 1.
      dt: step sizes [B, T, D], >= 0. A channel with dt = 0 (padding) leaves its state as it is: no decay, no input, no
        noise, no shift of the delay's slots. With `dt_softplus` what softplus makes the step size of; there padding is
        PADDED_DT.
      A: negative decay rates [D, N].
      B, C: input and output maps [B, T, N].
      D: skip [D]; y gains `D * u`.
      z: gate [B, T, D]; y is multiplied by `silu(z)` at the end.
      dt_bias: [D], added to dt.
      dt_softplus: take `softplus(dt + dt_bias)` as the step size, as Mamba does.
      reset: bool [B, T]; the state is zero before a token where it is True (the start of a document).
      initial_state: [B, D, N], or [B, 2, D, N] with `delay` (slot 0 the newest); zeros if None. Differentiable.
      readout: `(Z [N, N], g [N], F [N, N] or None)`: y reads `s + s F^T` with `s = x * swish(x Z^T + g)` in place of x.
        `(None, None, F)` reads `x + x F^T`. The states of more than a chunk never exist at once.
      delay: m [D] in (0, 1): the recurrence decays `(1 - m) x_{k-1} + m x_{k-2}` in place of x_{k-1}.
      process_noise: `(key, std)`: adds `std * normal` to every state at every token with dt > 0. Drawn inside, from the
        key folded with the token's index: the same for every implementation and chunk. `(key, std, start)` counts from
        start, which a call on a later part of a sequence needs to draw what one call on the whole draws.
      prior: also return the a-priori outputs `(exp(dt_k A) x_{k-1}) C_k`, without skip and without `readout`.
      implementation: None picks for the platform: 'mosaic_gpu' on NVIDIA GPUs where it has the options asked for and a
        GPU of the same major compute capability has verified it (a warning says when not; it is written for 8.0 and
        newer), 'chunked' elsewhere. 'reference' (sequential),
        'associative' (whole-sequence associative scan, memory O(T D N)), 'chunked' (rematerialised chunks),
        'mosaic_gpu' (fused kernels) or 'mosaic_gpu_scaled' (those for a scaled readout, by tensor cores; before
        'mosaic_gpu', where a GPU has verified it). A chunk is stepped on CPU and scanned associatively elsewhere;
        'chunked_stepped' and 'chunked_associative' say which.
      chunk: tokens a chunk of 'chunked'; None picks for the platform.
      keep_every: of 'mosaic_gpu' alone, steps between the states kept for the backward pass; None for one a tile (16
        steps as a rule), a multiple of that for less memory and more work.

    Returns:
      `(y [B, T, D], final_state)`, with `prior=True` also the a-priori outputs [B, T, D]; final_state has
      initial_state's shape and continues the scan when passed as initial_state of a later call. y and the a-priori
      outputs have u's type, the state is float32 (or float64).

    Raises:
      ValueError: a shape that does not fit, naming the argument, or an implementation that does not exist or cannot run
        here, with the reason.
    """
    for name, count in (('chunk', chunk), ('keep_every', keep_every)):
        if count is not None and count < 1:
            raise ValueError(f'{name} must be at least 1, got {count}')
    found = sizes(selective_scan, locals(), WORDS, slots=() if delay is None else (2,))
    _check_readout(readout, found['n'])
    if dt_bias is not None and not dt_softplus:  # a plain sum, of full precision
        dt, dt_bias = dt.astype(jnp.promote_types(dt.dtype, jnp.float32)) + dt_bias, None
    inputs, options = _inputs(u, dt, A, B, C, reset, initial_state, readout, delay, process_noise, prior)
    fused = Fused(D, z, dt_bias, dt_softplus)
    shape, element = (found['b'], found['t'], found['d']), mosaic_gpu.element_type(u, dt, z)
    variants = lambda: mosaic_gpu.variants(
        shape,
        found['n'],
        element,
        options.Z is not None,
        prior,
        keep_every,
    )
    portable = lambda name, run, by_name=True: Candidate(
        name, lambda: _separately(run, inputs, options, fused), by_name=by_name
    )
    chunked = lambda inner: lambda inputs, options: xla.chunked(inputs, options, chunk, inner)
    candidates = (
        Candidate(
            'mosaic_gpu_scaled',
            lambda: _scaled_kernel(u, dt, A, B, C, fused, inputs, options),
            lambda: _scaled_refuses(shape, element, inputs, options, keep_every, named=implementation is not None),
            lambda: scaled_mosaic_gpu.VARIANTS,
            silent=True,
        ),
        Candidate(
            'mosaic_gpu',
            lambda: _fused_kernel(u, dt, A, B, C, fused, inputs, options, keep_every),
            lambda: _fused_refuses(element, inputs, options),
            variants,
        ),
        portable('chunked', chunked(None), by_name=False),
        portable('chunked_associative', chunked('associative')),
        portable('chunked_stepped', chunked('stepped')),
        portable('associative', xla.associative),
        portable('reference', reference.scan),
    )
    y, final_state, prior_y = choose('selective_scan', implementation, candidates).run()
    y = y.astype(u.dtype)
    return (y, final_state, prior_y.astype(u.dtype)) if prior else (y, final_state)


class Fused(NamedTuple):
    """What surrounds the recurrence, token by token, and is part of the kernel on a GPU."""

    D: jax.Array | None
    z: jax.Array | None
    dt_bias: jax.Array | None
    dt_softplus: bool


def _separately(run: Callable[[Inputs, Options], Outputs], inputs: Inputs, options: Options, fused: Fused) -> Outputs:
    """An implementation of the recurrence alone, with step sizes, skip and gate around it."""
    dt = inputs.dt
    if fused.dt_bias is not None:
        dt = dt + fused.dt_bias.astype(dt.dtype)
    if fused.dt_softplus:
        dt = jax.nn.softplus(dt)
    y, final_state, prior = run(inputs._replace(dt=dt), options)
    if fused.D is not None:
        y = y + fused.D.astype(y.dtype) * inputs.u
    if fused.z is not None:
        y = y * jax.nn.silu(fused.z.astype(y.dtype))
    return Outputs(y, final_state, prior)


def _kernels_refuse(options: Options) -> str | None:
    """Why no GPU kernel can take this call, or None."""
    if options.delay is not None:
        return 'a delay inside the recurrence is of second order; taps on the outputs are not'
    if options.noise_key is not None:
        return 'it draws no process noise'
    return None


def _fused_refuses(element: Any, inputs: Inputs, options: Options) -> str | None:
    states, readout = inputs.A.shape[1], options.Z is not None
    return _kernels_refuse(options) or mosaic_gpu.unsupported(inputs.u.dtype, element, states, readout)


def _scaled_refuses(
    shape: tuple[int, int, int], element: Any, inputs: Inputs, options: Options, keep_every: int | None, named: bool
) -> str | None:
    states, readout = inputs.A.shape[1], options.Z is not None
    return (
        _kernels_refuse(options)
        or scaled_mosaic_gpu.unsupported(inputs.u.dtype, element, states, readout, options.prior)
        or scaled_mosaic_gpu.unfit(shape, keep_every)
        or (None if named else scaled_mosaic_gpu.slower(shape, states, element))
    )


def _scaled_kernel(u, dt, A, B, C, fused: Fused, inputs: Inputs, options: Options) -> Outputs:
    """The GPU kernels for a scaled readout."""
    y, final_state = scaled_mosaic_gpu.scan(
        u,
        dt,
        A,
        B,
        _read(C, inputs, options),
        **fused._asdict(),
        Z=options.Z,
        g=options.g,
        reset=inputs.reset,
        initial_state=inputs.initial_state,
    )
    return Outputs(y, final_state, None)


def _read(C: jax.Array, inputs: Inputs, options: Options) -> jax.Array:
    """What reads the states, C with the delayed ones' weights."""
    if options.F is None:
        return C
    return inputs.C + jnp.einsum('btm,mn->btn', inputs.C, options.F, precision='highest')


def _fused_kernel(u, dt, A, B, C, fused: Fused, inputs: Inputs, options: Options, keep_every: int | None) -> Outputs:
    """The GPU kernels: a call for y, and one for the a-priori outputs where they are asked for."""
    run = functools.partial(
        mosaic_gpu.scan,
        u,
        dt,
        A,
        B,
        dt_bias=fused.dt_bias,
        dt_softplus=fused.dt_softplus,
        reset=inputs.reset,
        initial_state=inputs.initial_state,
        keep_every=keep_every,
    )
    y, final_state = run(_read(C, inputs, options), D=fused.D, z=fused.z, Z=options.Z, g=options.g)
    prior, final_state = run(C, prior=True) if options.prior else (None, final_state)
    return Outputs(y, final_state, prior)


def _check_readout(readout: tuple | None, states: int) -> None:
    Z, g, F = readout or (None, None, None)
    if (Z is None) != (g is None):
        raise ValueError('selective_scan: readout needs Z and g together, or neither')
    dims = {'readout Z': ('n', 'n'), 'readout g': ('n',), 'readout F': ('n', 'n')}
    fitted('selective_scan', dims, {'readout Z': Z, 'readout g': g, 'readout F': F}, WORDS, n=states)


def _inputs(u, dt, A, B, C, reset, initial_state, readout, delay, process_noise, prior) -> tuple[Inputs, Options]:
    """What the implementations take, in float32 or, if anything is float64, in that."""
    (batch, _, channels), states = u.shape, A.shape[1]
    Z, g, F = readout or (None, None, None)
    dtype = jnp.promote_types(jnp.result_type(u, dt, A, B, C), jnp.float32)
    if initial_state is None:
        slots = () if delay is None else (2,)
        initial_state = jnp.zeros((batch, *slots, channels, states), dtype)
    key, std, *start = process_noise if process_noise is not None else (None, None)
    cast = lambda x: None if x is None else jnp.asarray(x, dtype)
    reset = None if reset is None else reset.astype(bool)
    inputs = Inputs(cast(u), cast(dt), cast(A), cast(B), cast(C), reset, cast(initial_state))
    return inputs, Options(cast(Z), cast(g), cast(F), cast(delay), key, cast(std), prior, *start)
