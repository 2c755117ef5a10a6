"""The selective scan with a scaled readout on Hopper GPUs: y reads `h * swish(h Z^T + g)`, products by tensor cores.

It takes the calls that training has most of: 16 states or fewer, channels in whole blocks of 128, enough of them that
time need not be cut; `mosaic_gpu` takes the others. This module is what surrounds the kernels: which calls they take,
their inputs, and the custom gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import platform
from kernels_pallas.selective_scan import mosaic_gpu, state_products
from kernels_pallas.selective_scan.mosaic_gpu.tiles import CHANNELS, FLOAT, FORGET, LANES, LOG2E, Problem, with_offset
from kernels_pallas.selective_scan.scaled_kernels import TILE, Arrays, backward, forward
from kernels_pallas.selective_scan.state_products import STATES

VARIANTS = ('scaled',)  # the name of its card


def unsupported(dtype: Any, element: Any, states: int, readout: bool, prior: bool) -> str | None:
    """Why such calls cannot run here, or None; arguments as for `mosaic_gpu.unsupported` and `mosaic_gpu.variants`."""
    if not readout or prior:
        return 'it is for a scaled readout alone'
    if (reason := mosaic_gpu.unsupported(dtype, element, states, readout)) is not None:
        return reason
    if (capability := platform.compute_capability()) != (9, 0):
        return f'it is written for compute capability 9.0, and this GPU has {capability[0]}.{capability[1]}'
    return None


def unfit(shape: tuple[int, int, int], keep_every: int | None) -> str | None:
    """Why it cannot take a call of u [B, T, D], or None."""
    if keep_every is not None:
        return f'it keeps a state every {TILE} steps, not every {keep_every}'
    if shape[2] % CHANNELS:
        return f'it takes channels in blocks of {CHANNELS}, and there are {shape[2]}'
    return None


def slower(shape: tuple[int, int, int], states: int, element: Any) -> str | None:
    """Why `mosaic_gpu` is better for a call that it could take, or None."""
    if 'sliced' in mosaic_gpu.variants(shape, states, element, True, False, None):
        return f'it does not cut time, and u {list(shape)} leaves much of this GPU idle'
    return None


def scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    Z: jax.Array,
    g: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    reset: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The selective scan of `kernels_pallas.selective_scan`, whose arguments these are; differentiable in every array.

    Args:
      Z, g: of the readout.
      dt_bias: only with dt_softplus.
      interpret: parameters of Mosaic's interpreter, to run on a CPU.

    Returns:
      `(y [B, T, D] of u's type, final state [B, D, N] float32)`. There is no second derivative.
    """
    batch, length, channels = u.shape
    states = A.shape[1]
    half = all(x.dtype == jnp.bfloat16 for x in (u, dt, z) if x is not None)
    dtype = jnp.dtype(jnp.bfloat16 if half else jnp.float32)
    # A tile that is one run of bytes must not lead over the end of its row (mosaic.Copy.runs_on).
    extra = -length % TILE if channels == CHANNELS and batch > 1 else 0
    later = lambda x, value=0: jnp.pad(x, ((0, 0), (0, extra), (0, 0)), constant_values=value)
    axes = (channels // LANES, LANES)
    tokens = lambda x, value=0: later(x.astype(dtype), value).reshape(batch, length + extra, *axes)
    per_channel = lambda x: (jnp.zeros(channels, FLOAT) if x is None else x.astype(FLOAT)).reshape(axes)
    per_state = lambda x: jnp.pad(x.astype(FLOAT), [(0, 0)] * (x.ndim - 1) + [(0, STATES - states)])
    if initial_state is None:
        initial_state = jnp.zeros((batch, channels, states), FLOAT)
    arrays = {'u': tokens(u), 'dt': tokens(dt, FORGET if dt_softplus else 0)}  # of which softplus is 0
    arrays |= {'B': later(per_state(B)), 'C': later(per_state(C)), 'A': per_state(A).reshape(*axes, STATES)}
    arrays |= {'D': per_channel(D), 'bias': per_channel(dt_bias), 'g': per_state(g)}
    arrays |= {'Z': jnp.pad(per_state(Z), ((0, STATES - states), (0, 0)))}
    arrays |= {'state': per_state(initial_state).reshape(batch, *axes, STATES)}
    if z is not None:
        arrays['z'] = tokens(z)
    if reset is not None:
        arrays['offset'] = jnp.where(jnp.pad(reset, ((0, 0), (0, extra))), FORGET, 0.0).astype(FLOAT)
    problem = Problem(
        batch=batch,
        length=length + extra,
        channels=channels,
        states=STATES,
        dtype=dtype,
        gate=z is not None,
        softplus=dt_softplus,
        reset=reset is not None,
        readout=True,
        prior=False,
        tma=True,
    )
    y, final = _scan(problem, interpret, arrays)
    y = y.reshape(batch, length + extra, channels)[:, :length].astype(u.dtype)
    return y, final.reshape(batch, channels, STATES)[..., :states]


# ------------------------------------------------------------------------------------------------------- gradient
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(problem: Problem, interpret: Any, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    out = forward(problem, _inputs(problem, arrays), keep=False, interpret=interpret)
    return out['y'], out['final']


def _scan_forward(problem: Problem, interpret: Any, arrays: Arrays):
    out = forward(problem, _inputs(problem, arrays), keep=True, interpret=interpret)
    return (out['y'], out['final']), (arrays, out['states'])


def _scan_backward(problem: Problem, interpret: Any, kept, cotangents):
    arrays, states = kept
    dy, dfinal = cotangents
    out = backward(problem, _inputs(problem, arrays) | {'states': states, 'dy': dy, 'dfinal': dfinal}, interpret)
    found = {name: out[f'd{name}'] for name in ('u', 'dt', 'z', 'state') if name in arrays}
    found |= {name: jnp.sum(out[f'd{name}'], axis=1)[:, : problem.length] for name in ('B', 'C')}  # blocks, in order
    found |= {name: jnp.sum(out[f'd{name}'], axis=0) for name in ('A', 'D', 'bias')}
    found['Z'] = state_products.unfolded(jnp.sum(out['dZ'], axis=(0, 1)))
    found['g'] = jnp.sum(out['dg'], axis=(0, 1, 2))
    if problem.reset:
        found['offset'] = jnp.zeros_like(arrays['offset'])
    return (found,)


_scan.defvjp(_scan_forward, _scan_backward)


def _inputs(problem: Problem, arrays: Arrays) -> Arrays:
    """The kernels' inputs: A in base 2, the resets with B, Z and its transpose as fragments, which tokens there are."""
    out = dict(arrays)
    out['A'] = arrays['A'] * LOG2E
    if problem.reset:
        out['B'] = with_offset(arrays['B'], out.pop('offset'), problem.columns)
    out['Zt'] = state_products.fragments(arrays['Z'].T)
    out['Z'] = state_products.fragments(arrays['Z'])
    if problem.length % TILE:
        out['live'] = (jnp.arange(-(-problem.length // TILE) * TILE) < problem.length).astype(FLOAT)
    return out
