"""What the kernels share: the problem's description, how arrays lie in threads, and the scalar functions.

A block of 128 threads owns 128 channels. The forward kernels see them as one axis, `[.., D]`; the backward kernel,
which sums over the channels of a warp, as two, `[.., D/32, 32]`. Nothing is moved for that: it is a reshape.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic
from kernels_pallas.mosaic import load

WARPS, LANES = 4, 32
CHANNELS = WARPS * LANES  # of a block
LOG2E, LN2 = math.log2(math.e), math.log(2)
FLOAT = jnp.float32
MAX_ROWS = 65535
FORGET = -1e30  # added to the exponent where a document starts: 2^FORGET is 0


@dataclass(frozen=True)
class Problem:
    """Sizes and options that a kernel is compiled for. `channels` is a multiple of 128, `states` of 8."""

    batch: int
    length: int
    channels: int
    states: int
    dtype: Any  # of u, dt, z, y and their gradients
    gate: bool  # y * silu(z)
    softplus: bool  # of dt + bias
    reset: bool
    readout: bool
    prior: bool  # y is what is carried into a token, read before its own input, without skip and gate
    tma: bool  # Hopper's copy engine; else plain asynchronous copies (Ampere), and `length` is a multiple of the tile

    def tokens(self, axes: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """u, dt, z, y and their gradients, [B, T, *axes]; `axes` is (D,) or (D/32, 32)."""
        return jax.ShapeDtypeStruct((self.batch, self.length, *axes), self.dtype)

    @property
    def columns(self) -> int:
        """Columns of the map that brings resets along, see `with_offset`."""
        # One more would do, but Ampere copies 128 numbers at a time, of tiles of 16 steps or, where they do not fit, 8.
        return self.states + (0 if not self.reset else 16 if self.readout or self.states in (48, 64) else 8)

    @property
    def axes(self) -> tuple[int, ...]:
        """The channels as one axis."""
        return (self.channels,)

    @property
    def warp_axes(self) -> tuple[int, ...]:
        """The channels as groups of a warp's width."""
        return (self.channels // LANES, LANES)


def with_offset(projection: jax.Array, offset: jax.Array, columns: int) -> jax.Array:
    """A token's map B or C [B, T, N] with what is added to its exponents [B, T] behind it: it arrives on one way."""
    behind = jnp.pad(offset[..., None], ((0, 0), (0, 0), (0, columns - projection.shape[-1] - 1)))
    return jnp.concatenate([projection, behind], axis=-1)


# ------------------------------------------------------------------------------------------------------- layouts
def thread_a_channel() -> Any:
    """(128, N): a thread holds all states of one channel, so that a sum over states stays in its registers."""
    return mosaic.tiled(((CHANNELS, 4), (LANES, 4)), (-4,), (-2,))


def lanes_over_states(states: int) -> Any:
    """(4, 32, N), N = 8 or 16: N / 4 lanes share a channel, four states each, and a thread holds N / 4 channels.

    Sums over states and over a warp's channels both take few shuffles (for N = 16: 2, and 3 for a group of 4).
    """
    return mosaic.tiled(((WARPS, LANES, states), (1, 128 // states, 4)), (-6,), (-4, -2))


def thread_a_channel_over_time(steps: int) -> Any:
    """(T, 4, 32): a thread holds one channel at every step."""
    return mosaic.tiled(((steps, WARPS, LANES), (1, 1, 1)), (-5,), (-4,))


def states_by_states(states: int) -> Any:
    """(4, N, N), N = 16: each warp a matrix of its own."""
    return mosaic.tiled(((WARPS, states, states), (1, 128 // states, 4)), (-6,), (-4, -2))


def plain(shape: tuple[int, ...]) -> Any:
    """Threads one after the other."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=1)


class Spread:
    """Loads into a layout of (*channels, N), or into its parts, and spreads the parts over the whole."""

    def __init__(self, layout: Any, channels: tuple[int, ...], states: int) -> None:
        rank = len(channels)
        self.shape = (*channels, states)
        self._channel_dims, self._state_dim = tuple(range(rank)), (rank,)
        self.layout = layout
        self.per_channel, self.per_state = layout.reduce(rank), layout.reduce(self._channel_dims)

    def load(self, ref: Any) -> jax.Array:
        """(*channels, N)."""
        return load(ref, self.layout)

    def load_channels(self, ref: Any) -> jax.Array:
        """(*channels,)."""
        return load(ref, self.per_channel)

    def load_states(self, ref: Any) -> jax.Array:
        """(N,)."""
        return load(ref, self.per_state)

    def over_states(self, x: jax.Array) -> jax.Array:
        """(*channels,) to (*channels, N)."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, self.shape, self._channel_dims), self.layout)

    def over_channels(self, x: jax.Array) -> jax.Array:
        """(N,) to (*channels, N)."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, self.shape, self._state_dim), self.layout)

    def zeros(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(self.shape, FLOAT), self.layout)


# ----------------------------------------------------------------------------------------------------- functions
def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)) without overflow, and to 3e-6 of it for small step sizes too, where 1 + exp(x) loses exp(x)."""
    w = jnp.exp2(-LOG2E * jnp.abs(x))
    series = w * (1.0 - w * (0.5 - w * (1 / 3 - w * 0.25)))
    return jnp.maximum(x, 0.0) + jnp.where(w < 1 / 16, series, LN2 * jnp.log2(1.0 + w))


def sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp2(-LOG2E * x))


def where(condition: jax.Array, value: float) -> jax.Array:
    """`value` or 0, by a scalar."""
    return jnp.where(condition, value, 0.0).astype(FLOAT)


# ------------------------------------------------------------------------------------------------------ launching
def launch(name: str, problem: Problem, body: Any, inputs: dict, outputs: dict, scratch: dict, interpret: Any) -> dict:
    """`mosaic.launch` for every batch row and 128 channels."""
    grid = {'row': problem.batch, 'block': problem.channels // CHANNELS}
    if problem.batch > MAX_ROWS:  # of CUDA's axes, the one that Pallas gives to the last may grow further
        grid = dict(reversed(grid.items()))
    return mosaic.launch(name, body, inputs, outputs, scratch, grid, interpret)
