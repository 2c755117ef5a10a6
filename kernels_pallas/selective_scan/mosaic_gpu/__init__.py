"""Selective scan on GPUs by Pallas Mosaic kernels: fused with softplus, skip and gate, for Hopper and Ampere.

This module is what surrounds the kernels: padding, the split over time, and the custom gradient.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import platform
from kernels_pallas.affine import compose
from kernels_pallas.selective_scan.mosaic_gpu import tuning
from kernels_pallas.selective_scan.mosaic_gpu.backward import backward, shared_bytes
from kernels_pallas.selective_scan.mosaic_gpu.forward import cocarry, forward
from kernels_pallas.selective_scan.mosaic_gpu.tiles import CHANNELS, FORGET, LOG2E, Problem, with_offset

MAX_STATES = 64
# Shared memory that a block may take, by compute capability (CUDA C++ Programming Guide); 99 KiB elsewhere.
SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
PADDED_DT = -1e30  # softplus of it is 0: a token that leaves the state as it is

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Plan:
    """A problem with everything that was chosen for it."""

    problem: Problem  # of one slice of time: batch counts slices
    settings: tuning.Settings
    slices: int  # of time
    keep_every: int  # steps between the states kept for the backward pass, a multiple of settings.backward_tile
    interpret: Any = None

    @property
    def rows(self) -> int:
        return self.problem.batch // self.slices


def element_type(*tokens: jax.Array | None) -> Any:
    """What u, dt, z and y are in the kernels: bfloat16 where all of them are, else float32."""
    half = all(x.dtype == jnp.bfloat16 for x in tokens if x is not None)
    return jnp.dtype(jnp.bfloat16 if half else jnp.float32)


def unsupported(dtype: Any, element: Any, states: int, readout: bool) -> str | None:
    """Why these arguments cannot run here, or None; `dtype` is the computation's, `element` that of `element_type`."""
    if platform.platform() != 'gpu':
        return f'it needs an NVIDIA GPU, and this is for {platform.platform()}'
    capability = platform.compute_capability()
    if capability < (8, 0):
        return f'it needs compute capability 8.0 or newer, and this GPU has {capability[0]}.{capability[1]}'
    if dtype == jnp.float64:
        return 'it computes in float32, and an input is float64'
    if states > MAX_STATES:
        return f'it holds at most {MAX_STATES} states a channel, not {states}'
    if readout and states > 16:
        return f'its readout scales at most 16 states a channel, not {states}'
    generation, padded = tuning.generation(capability), padded_states(states, readout)
    chosen = tuning.settings(generation, padded, element.itemsize, readout)
    everything = {'gate': True, 'softplus': True, 'reset': True, 'readout': readout, 'prior': False}
    problem = Problem(1, 1, CHANNELS, padded, element, tma=generation == 'hopper', **everything)
    needed, has = shared_bytes(problem, chosen.backward_tile, chosen.stretch), SHARED_BYTES.get(capability, 99 << 10)
    if needed > has:
        case = f'{states} states a channel in {element.name}' + (' with a readout' if readout else '')
        return f'its gradient needs {needed >> 10} KiB of shared memory for {case}, and this GPU has {has >> 10} KiB'
    return None


def padded_states(states: int, readout: bool) -> int:
    """How many states the kernels hold a channel, for so many."""
    return 16 if readout else -(-states // 8) * 8


def variants(
    shape: tuple[int, int, int], states: int, element: Any, readout: bool, prior: bool, keep_every: int | None
) -> tuple[str, ...]:
    """Which of the kernels a call runs, by the names of their cards.

    Args:
      shape: of u, [B, T, D].
      states: N.
      element: of `element_type`.
      readout: whether y reads scaled states.
      prior: whether the a-priori outputs are asked for, too.
      keep_every: as for `scan`.
    """
    held = padded_states(states, readout)
    chosen = tuning.settings(tuning.generation(platform.compute_capability()), held, element.itemsize, readout)
    named = {
        'readout': readout,
        'prior': prior,
        'wide': held > 16,
        'sliced': _slices(shape, chosen, None) > 1,
        'kept': keep_every is not None and keep_every > chosen.backward_tile,
    }
    return 'scan', *(name for name, runs in named.items() if runs)


def _slices(shape: tuple[int, int, int], settings: tuning.Settings, cores: int | None) -> int:
    """Into how many slices the time of u [B, T, D] is split to fill so many multiprocessors, or this device's."""
    batch, length, channels = shape
    cores = cores or getattr(platform.device(), 'core_count', 132)
    return tuning.time_splits(batch * -(-channels // CHANNELS), length, cores, settings.forward_tile)


def scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    reset: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    Z: jax.Array | None = None,
    g: jax.Array | None = None,
    prior: bool = False,
    keep_every: int | None = None,
    splits: int | None = None,
    settings: tuning.Settings | None = None,
    generation: str | None = None,
    cores: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The selective scan of `kernels_pallas.selective_scan`, whose arguments these are; differentiable in every array.

    Args:
      dt_bias: only with dt_softplus.
      prior: y is the a-priori output, `(exp(dt A) x_{k-1}) C_k`, without skip, gate and readout.
      keep_every: steps between the states that are kept for the backward pass; None for one a tile of its kernel
        (16 steps, 4 N / 16 bytes a channel and token). A multiple of the tile, 64 say, keeps a fourth and computes the
        others anew in the backward pass, for one exponential more a state.
      splits: slices of time run in parallel; None fills the GPU.
      settings: tile sizes; None takes the tuned ones.
      generation: 'hopper' or 'ampere'; None asks the device.
      cores: multiprocessors to fill; None asks the device.
      interpret: parameters of Mosaic's interpreter, to run on a CPU.

    Returns:
      `(y [B, T, D] of u's type, final state [B, D, N] float32)`.

    Raises:
      ValueError: keep_every or splits that do not fit. There is no second derivative.
    """
    batch, length, channels = u.shape
    states = A.shape[1]
    dtype = element_type(u, dt, z)
    D = None if prior else D
    gate, readout = z is not None and not prior, Z is not None and not prior
    generation = generation or tuning.generation(platform.compute_capability())
    held = padded_states(states, readout)
    settings = settings or tuning.settings(generation, held, dtype.itemsize, readout)
    back, ahead = settings.backward_tile, settings.forward_tile
    keep_every = back if keep_every is None else keep_every
    if keep_every < 1 or keep_every % back or (keep_every % ahead and ahead % keep_every):
        raise ValueError(
            f'keep_every={keep_every} must be a multiple of {back}, and a multiple or a divisor of {ahead}: the tiles'
        )
    if splits is not None and splits < 1:
        raise ValueError(f'splits must be at least 1, got {splits}')
    if splits is None:
        splits = _slices(u.shape, settings, cores)  # type: ignore[arg-type]  # of three axes

    # Slices of time have one length; Ampere wants whole tiles, as do tiles that are one run of bytes (mosaic.runs_on),
    # and states kept less often want whole groups.
    whole_tiles = generation != 'hopper' or (channels <= CHANNELS and batch * splits > 1)
    whole = math.lcm(math.lcm(ahead, back) if whole_tiles else 1, keep_every if keep_every > back else 1)
    padded = -(-length // (splits * whole)) * splits * whole
    extra_time, extra_channels = padded - length, -channels % CHANNELS
    extra_states = held - states

    pad = lambda x, *widths, value=0: jnp.pad(x, [(0, w) for w in widths], constant_values=value)
    tokens = lambda x, value=0: pad(pad(x.astype(dtype), 0, extra_time, 0, value=value), 0, 0, extra_channels)
    per_channel = lambda x: pad(
        jnp.zeros(channels, jnp.float32) if x is None else x.astype(jnp.float32), extra_channels
    )
    arrays = {'u': tokens(u), 'dt': tokens(dt, PADDED_DT if dt_softplus else 0)}
    arrays['A'] = pad(A.astype(jnp.float32), extra_channels, extra_states)
    arrays |= {name: pad(x.astype(jnp.float32), 0, extra_time, extra_states) for name, x in (('B', B), ('C', C))}
    arrays |= {'D': per_channel(D), 'bias': per_channel(dt_bias)}
    if initial_state is None:
        initial_state = jnp.zeros((batch, channels, states), jnp.float32)
    arrays['state'] = pad(initial_state.astype(jnp.float32), 0, extra_channels, extra_states)
    if gate:
        arrays['z'] = tokens(z)
    if readout:
        arrays |= {
            'Z': pad(Z.astype(jnp.float32), extra_states, extra_states),
            'g': pad(g.astype(jnp.float32), extra_states),
        }
    if reset is not None:
        arrays['offset'] = jnp.where(pad(reset, 0, extra_time), FORGET, 0.0).astype(jnp.float32)

    problem = Problem(
        batch=batch * splits,
        length=padded // splits,
        channels=channels + extra_channels,
        states=held,
        dtype=dtype,
        gate=gate,
        softplus=dt_softplus,
        reset=reset is not None,
        readout=readout,
        prior=prior,
        tma=generation == 'hopper',
    )
    y, final = _scan(Plan(problem, settings, splits, keep_every, interpret), arrays)
    return y[:, :length, :channels].astype(u.dtype), final[:, :channels, :states]


# ------------------------------------------------------------------------------------------------------- gradient
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    y, final, _ = _forward(plan, arrays, keep=False)
    return y, final


def _scan_forward(plan: Plan, arrays: Arrays):
    y, final, states = _forward(plan, arrays, keep=True)
    return (y, final), (arrays, states)


def _scan_backward(plan: Plan, residuals, cotangents):
    return (_backward(plan, *residuals, *cotangents),)


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(plan: Plan, arrays: Arrays, keep: bool) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """y, the final state, and the kept states [slices, ...]."""
    inputs = _sliced(plan, arrays)
    if plan.slices > 1:
        inputs['state'] = _entering(plan, inputs, arrays['state'])
    tile, every = plan.settings.forward_tile, plan.keep_every if keep else 0
    names = ['u', 'dt', 'B', 'C', 'A', 'bias', 'state', *(n for n in ('z', 'Zt', 'g') if n in inputs)]
    if not plan.problem.prior:
        names.append('D')
    out = forward(
        plan.problem,
        {name: inputs[name] for name in names},
        tile=tile,
        unroll=plan.settings.unroll,
        checkpoint=every,
        interpret=plan.interpret,
    )
    final = out['final'].reshape(plan.rows, plan.slices, *out['final'].shape[1:])[:, -1]
    return out['y'].reshape(arrays['u'].shape), final, out.get('states')


def _backward(plan: Plan, arrays: Arrays, states: jax.Array, dy: jax.Array, dfinal: jax.Array) -> Arrays:
    """The gradient of every array."""
    problem, settings = plan.problem, plan.settings
    inputs = _sliced(plan, arrays)
    tile = settings.backward_tile
    if plan.keep_every > tile:
        states = _refined(plan, inputs, states)

    tokens = lambda x: x.reshape(*x.shape[:-1], *problem.warp_axes)
    warps = lambda x, axis: x.reshape(*x.shape[:axis], *problem.warp_axes, *x.shape[axis + 1 :])
    given: Arrays = {name: tokens(inputs[name]) for name in ('u', 'dt', 'z') if name in inputs}
    given['dy'] = tokens(dy.reshape(inputs['u'].shape))
    given |= {name: inputs[name] for name in ('B', 'C')}
    given |= {'A': warps(inputs['A'], 0), 'D': warps(inputs['D'], 0), 'bias': warps(inputs['bias'], 0)}
    given['states'] = warps(states, 2)
    if problem.length % tile:
        given['live'] = (jnp.arange(-(-problem.length // tile) * tile) < problem.length).astype(jnp.float32)
    if problem.readout:
        given |= {name: inputs[name] for name in ('Z', 'Zt', 'g')}

    def run(dfinal):  # [slices, D, N]
        return backward(
            problem,
            {**given, 'dfinal': warps(dfinal, 1)},
            tile=tile,
            stretch=settings.stretch,
            interpret=plan.interpret,
        )

    if plan.slices > 1:
        leaving = _leaving(plan, inputs, dy, dfinal, run)
    else:
        leaving = dfinal
    out = run(leaving)
    shape = arrays['u'].shape
    gradients = {'u': out['du'].reshape(shape), 'dt': out['ddt'].reshape(shape)}
    if problem.gate:
        gradients['z'] = out['dz'].reshape(shape)
    for name in ('B', 'C'):  # the sum over blocks, in order
        partial = jnp.sum(out[f'd{name}'], axis=1)[:, : problem.length]
        gradients[name] = partial.reshape(arrays[name].shape)
    gradients['A'] = jnp.sum(out['dA'], axis=0).reshape(arrays['A'].shape)
    first = out['dstate'].reshape(plan.rows, plan.slices, *arrays['state'].shape[1:])[:, 0]
    gradients['state'] = first
    for name in ('D', 'bias'):
        gradients[name] = jnp.sum(out[f'd{name}'], axis=0).reshape(arrays[name].shape)
    if problem.readout:
        gradients |= {'Z': jnp.sum(out['dZ'], axis=(0, 1)), 'g': jnp.sum(out['dg'], axis=(0, 1))}
    if problem.reset:
        gradients['offset'] = jnp.zeros_like(arrays['offset'])
    return gradients


# ------------------------------------------------------------------------------------------------- slices of time
def _sliced(plan: Plan, arrays: Arrays) -> Arrays:
    """The kernels' inputs: A in base 2, slices of time as rows, and the resets with B."""
    out = dict(arrays)
    out['A'] = arrays['A'] * LOG2E
    if plan.problem.readout:
        out['Zt'] = arrays['Z'].T
    for name in ('u', 'dt', 'z', 'B', 'C', 'offset'):
        if name in arrays:
            x = arrays[name]
            out[name] = x.reshape(plan.problem.batch, plan.problem.length, *x.shape[2:])
    if plan.problem.reset:
        out['B'] = with_offset(out['B'], out['offset'], plan.problem.columns)
    return out


def _decay(plan: Plan, inputs: Arrays) -> jax.Array:
    """What a slice of time leaves of the state it is entered with, [rows, slices, D, N]."""
    dt = inputs['dt'].astype(jnp.float32) + inputs['bias']
    dt = jax.nn.softplus(dt) if plan.problem.softplus else dt
    exponent = jnp.sum(dt, axis=1)[..., None] * inputs['A']
    if plan.problem.reset:
        exponent = exponent + jnp.min(inputs['offset'], axis=1)[:, None, None]
    return jnp.exp2(exponent).reshape(plan.rows, plan.slices, *exponent.shape[1:])


def _entering(plan: Plan, inputs: Arrays, state: jax.Array) -> jax.Array:
    """The state that every slice is entered with, [rows * slices, D, N], from each slice's own and the initial one."""
    names = ['u', 'dt', 'B', 'A', 'bias']
    given = {name: inputs[name] for name in names}
    given['state'] = jnp.zeros((plan.problem.batch, *state.shape[1:]), jnp.float32)
    tile = plan.settings.forward_tile
    local = forward(
        plan.problem,
        given,
        tile=tile,
        unroll=plan.settings.unroll,
        read=False,
        interpret=plan.interpret,
    )['final']
    local = local.reshape(plan.rows, plan.slices, *local.shape[1:])
    decay = _decay(plan, inputs)
    first = decay[:, :1] * state[:, None] + local[:, :1]
    _, after = lax.associative_scan(compose, (decay, jnp.concatenate([first, local[:, 1:]], 1)), axis=1)
    entering = jnp.concatenate([state[:, None], after[:, :-1]], 1)
    return entering.reshape(plan.problem.batch, *state.shape[1:])


def _leaving(plan: Plan, inputs: Arrays, dy: jax.Array, dfinal: jax.Array, run: Any) -> jax.Array:
    """The cotangent of the state that every slice is left with, [rows * slices, D, N]."""
    problem = plan.problem
    if problem.readout:  # the cotangent depends on the states, which only the backward kernel has
        local = run(jnp.zeros((problem.batch, *dfinal.shape[1:]), jnp.float32))['dstate']
    else:
        names = ['dt', 'C', 'A', 'bias', *(['z'] if 'z' in inputs else [])]
        given = {'dy': dy.reshape(inputs['u'].shape), **{name: inputs[name] for name in names}}
        if problem.reset:
            given['C'] = with_offset(given['C'], inputs['offset'], problem.columns)
        tile = plan.settings.forward_tile
        local = cocarry(problem, given, tile=tile, unroll=plan.settings.unroll, interpret=plan.interpret)
    local = local.reshape(plan.rows, plan.slices, *dfinal.shape[1:])
    decay = _decay(plan, inputs)
    last = decay[:, -1:] * dfinal[:, None] + local[:, -1:]
    _, before = lax.associative_scan(compose, (decay, jnp.concatenate([local[:, :-1], last], 1)), axis=1, reverse=True)
    leaving = jnp.concatenate([before[:, 1:], dfinal[:, None]], 1)
    return leaving.reshape(problem.batch, *dfinal.shape[1:])


def _refined(plan: Plan, inputs: Arrays, states: jax.Array) -> jax.Array:
    """The state before every backward tile [B, T/tile, D, N] from one every `keep_every` steps: a pass in parallel."""
    problem, every = plan.problem, plan.keep_every
    groups = problem.length // every
    names = ['u', 'dt', 'B']
    given = {name: inputs[name].reshape(problem.batch * groups, every, *inputs[name].shape[2:]) for name in names}
    given |= {'A': inputs['A'], 'bias': inputs['bias'], 'state': states[:, :groups].reshape(-1, *states.shape[2:])}
    out = forward(
        dataclasses.replace(problem, batch=problem.batch * groups, length=every),
        given,
        tile=plan.settings.backward_tile,
        unroll=plan.settings.unroll,
        checkpoint=plan.settings.backward_tile,
        read=False,
        interpret=plan.interpret,
    )
    return out['states'].reshape(problem.batch, -1, *states.shape[2:])
