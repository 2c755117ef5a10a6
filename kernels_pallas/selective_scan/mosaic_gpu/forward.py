"""Forward kernels of the selective scan: a thread a channel, states in registers, tiles of time through shared memory.

The same recurrence serves three uses: with outputs it is the scan; without, it gives the state that a slice of time
ends in, or the states at checkpoints; and run backwards it gives the slice's cotangent (`cocarry`).
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic
from kernels_pallas.mosaic import Index, Span, Tiles, load, store
from kernels_pallas.selective_scan.mosaic_gpu.tiles import (
    CHANNELS,
    FLOAT,
    Problem,
    Spread,
    launch,
    plain,
    sigmoid,
    softplus,
    thread_a_channel,
    where,
)

SLOTS = 2  # tiles of time in flight
PART = 4  # states handled at a time
FETCHED = ('u', 'dy', 'dt', 'z', 'B', 'C')  # tile by tile


def forward(
    problem: Problem,
    inputs: dict[str, jax.Array],
    *,
    tile: int,
    unroll: int,
    checkpoint: int = 0,
    read: bool = True,
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """Runs the recurrence.

    Args:
      problem: sizes and options.
      inputs: u, dt, z [B, T, D]; B, C [B, T, N]; A [D, N] in base 2; D, bias [D]; state
        [B, D, N]; Zt [N, N] and g [N]. z, Zt and g only where the problem has them; C, D and z only with `read`. With
        resets B is `tiles.with_offset`.
      tile: steps a tile of time.
      unroll: steps written out in the innermost loop; divides tile and checkpoint.
      checkpoint: also store the state before every that many steps, a divisor or a multiple of the tile; 0 for none.
      read: also compute y.
      interpret: parameters of the interpreter, for tests.

    Returns:
      `final` [B, D, N]; `y` with `read`; `states` [B, T/checkpoint, D, N] with `checkpoint`.
    """
    readout, gate = problem.readout and read, problem.gate and read  # neither with a prior
    tiles, stretch = -(-problem.length // tile), min(checkpoint or tile, tile)
    spread, parts = _spread(problem)

    def body(ref: Any) -> None:
        row, mine, copies, A, step_size = _begin(problem, tile, spread, parts, inputs, ref)
        skip = spread.load_channels(ref.D.at[mine]) if read and not problem.prior else None
        if readout:
            for n in range(problem.states):  # a few kilobytes, once a block
                for part in parts:
                    store(ref.Zt_.at[n, part], spread.load_states(ref.Zt.at[n, part]))

        def scaled(h):
            """h * swish(h Z^T + g): a product over states, one column after the other out of shared memory."""
            for part, x in zip(parts, h):
                store(ref.h_.at[:, part], x)  # a thread reads back what it wrote itself

            def add(i, scores):
                for n in (PART * i + j for j in range(PART)):
                    column = spread.over_states(spread.load_channels(ref.h_.at[:, n]))
                    rows = (spread.over_channels(spread.load_states(ref.Zt_.at[n, part])) for part in parts)
                    scores = tuple(s + column * row for s, row in zip(scores, rows))
                return scores

            bias = tuple(spread.over_channels(spread.load_states(ref.g.at[part])) for part in parts)
            scores = lax.fori_loop(0, problem.states // PART, add, bias)
            return [x * s * sigmoid(s) for x, s in zip(h, scores)]

        def step(index, slot, t, h):
            u, dt = spread.load_channels(ref.u_.at[slot, t]).astype(FLOAT), step_size(index, slot, t)
            decay = spread.over_states(dt)
            offset = ref.B_[slot, t, problem.states] if problem.reset else None
            x, carried, after, total = spread.over_states(dt * u), [], [], None
            B = _ahead(spread, ref.B_, slot, t, parts)
            C = _ahead(spread, ref.C_, slot, t, parts) if read else None
            for i in range(len(parts)):  # part by part, lest all their temporaries live at once
                exponent = decay * A[i] if offset is None else decay * A[i] + offset
                carried.append(jnp.exp2(exponent) * h[i])
                after.append(carried[i] + x * spread.over_channels(B(i)))
                if read and not readout:
                    product = (carried if problem.prior else after)[i] * spread.over_channels(C(i))
                    total = product if total is None else total + product
            h = tuple(after)
            if read:
                if readout:
                    seen = enumerate(scaled(h))
                    total = functools.reduce(operator.add, (x * spread.over_channels(C(i)) for i, x in seen))
                y = jnp.sum(total, axis=1)
                if not problem.prior:
                    y = y + skip * u
                if gate:
                    z = spread.load_channels(ref.z_.at[slot, t]).astype(FLOAT)
                    y = y * z * sigmoid(z)
                store(ref.y_.at[slot, t], y.astype(problem.dtype))
            return h

        def keep(memory, h):
            for part, x in zip(parts, h):
                store(memory.at[:, part], x)

        def over_tile(index, slot, h):
            def over_stretch(i, h):
                if 0 < checkpoint <= tile:
                    keep(ref.states.at[row, index * (tile // stretch) + i, mine], h)

                def steps(k, h):
                    for j in range(unroll):
                        h = step(index, slot, i * stretch + k * unroll + j, h)
                    return h

                return lax.fori_loop(0, stretch // unroll, steps, h)

            if checkpoint > tile:

                @pl.when(lax.rem(index * tile, checkpoint) == 0)
                def _():
                    keep(ref.states.at[row, lax.div(index * tile, checkpoint), mine], h)

            h = lax.fori_loop(0, tile // stretch, over_stretch, h)
            if read:
                copies.fence()
                if problem.tma:
                    copies.send(ref.y_, ref.y, index, slot)
                    plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                else:
                    final = ref.y.at[row, pl.ds(index * tile, tile), mine]
                    store(final, load(ref.y_.at[slot], plain((tile, CHANNELS))))
            return h

        if readout:
            copies.fence()
        copies.begin()
        initial = tuple(spread.load(ref.state.at[row, mine, part]) for part in parts)
        keep(ref.final.at[row, mine], copies.fold(over_tile, initial))
        if read and problem.tma:
            plgpu.wait_smem_to_gmem(0)

    outputs = {'final': _state(problem, problem.batch)}
    scratch = _scratch(problem, tile, inputs)
    if read:
        outputs['y'] = problem.tokens(problem.axes)
        scratch['y_'] = plgpu.SMEM((SLOTS, tile, CHANNELS), problem.dtype)
    if checkpoint:
        outputs['states'] = _state(problem, problem.batch, -(-tiles * tile // checkpoint))
    if readout:
        scratch |= {
            'Zt_': plgpu.SMEM((problem.states, problem.states), FLOAT),
            'h_': plgpu.SMEM((CHANNELS, problem.states), FLOAT),
        }
    name = 'selective_scan_forward' if read else 'selective_scan_carry'
    return launch(name, problem, body, inputs, outputs, scratch, interpret)


def cocarry(
    problem: Problem, inputs: dict[str, jax.Array], *, tile: int, unroll: int, interpret: Any = None
) -> jax.Array:
    """Runs the cotangent of the state backwards over a slice of time, from zero: what comes before the slice receives.

    Args:
      problem: sizes and options; no readout.
      inputs: dy, dt, z [B, T, D]; C [B, T, N]; A, bias as for `forward`. With resets C is
        `tiles.with_offset`.
      tile: steps a tile of time.
      unroll: steps written out in the innermost loop.
      interpret: parameters of the interpreter, for tests.

    Returns:
      [B, D, N].
    """
    spread, parts = _spread(problem)

    def body(ref: Any) -> None:
        row, mine, copies, A, step_size = _begin(problem, tile, spread, parts, inputs, ref)

        def step(index, slot, t, g):
            dy, dt = spread.load_channels(ref.dy_.at[slot, t]).astype(FLOAT), step_size(index, slot, t)
            if problem.gate:
                z = spread.load_channels(ref.z_.at[slot, t]).astype(FLOAT)
                dy = dy * z * sigmoid(z)
            decay, dy, after = spread.over_states(dt), spread.over_states(dy), []
            offset = ref.C_[slot, t, problem.states] if problem.reset else None
            for i, part in enumerate(parts):
                exponent = decay * A[i] if offset is None else decay * A[i] + offset
                C = spread.over_channels(spread.load_states(ref.C_.at[slot, t, part]))
                after.append(jnp.exp2(exponent) * (g[i] + dy * C))
            return tuple(after)

        def over_tile(index, slot, g):
            def steps(i, g):
                for j in range(unroll):
                    g = step(index, slot, tile - 1 - (i * unroll + j), g)
                return g

            return lax.fori_loop(0, tile // unroll, steps, g)

        copies.begin(reverse=True)
        g = copies.fold(over_tile, tuple(spread.zeros() for _ in parts), reverse=True)
        for part, x in zip(parts, g):
            store(ref.costate.at[row, mine, part], x)

    outputs, scratch = {'costate': _state(problem, problem.batch)}, _scratch(problem, tile, inputs)
    return launch('selective_scan_cocarry', problem, body, inputs, outputs, scratch, interpret)['costate']


def _spread(problem: Problem) -> tuple[Spread, list[Any]]:
    """A thread holds a channel's states in parts of four, a vector load; and the parts' places among the states."""
    return Spread(thread_a_channel(), (CHANNELS,), PART), [pl.ds(i, PART) for i in range(0, problem.states, PART)]


def _begin(problem: Problem, tile: int, spread: Spread, parts: list[Any], inputs: dict, ref: Any) -> tuple:
    """What a block starts with: its row and channels, its copies of tiles, A by parts, and how step sizes are had."""
    row, channels = lax.axis_index('row'), Span(Index(lax.axis_index('block')) * CHANNELS, CHANNELS)
    fetched = [name for name in FETCHED if name in inputs and hasattr(ref, f'{name}_')]
    copies = Tiles(ref, tile, -(-problem.length // tile), row, channels, fetched, whole=('B', 'C'))
    mine = channels.ds
    A = [spread.load(ref.A.at[mine, part]) for part in parts]
    bias = spread.load_channels(ref.bias.at[mine])

    def step_size(index, slot, t):
        """dt of one token (128,), which is 0 behind the end."""
        dt = spread.load_channels(ref.dt_.at[slot, t]).astype(FLOAT) + bias
        dt = softplus(dt) if problem.softplus else dt
        return dt * where(index * tile + t < problem.length, 1.0) if problem.length % tile else dt

    return row, mine, copies, A, step_size


def _ahead(spread: Spread, memory: Any, slot: Any, t: Any, parts: list[Any]) -> Callable[[int], jax.Array]:
    """Part i of a token's B or C: loaded now, which takes a sixth fewer registers, or when asked for, if many."""
    load = lambda i: spread.load_states(memory.at[slot, t, parts[i]])
    return [load(i) for i in range(len(parts))].__getitem__ if len(parts) <= 4 else load


def _scratch(problem: Problem, tile: int, inputs: dict) -> dict:
    channels = {name: ((CHANNELS,), problem.dtype) for name in ('u', 'dy', 'dt', 'z') if name in inputs}
    states = {name: (inputs[name].shape[2:], FLOAT) for name in ('B', 'C') if name in inputs}
    return mosaic.slots(tile, channels | states, SLOTS, engine=problem.tma)


def _state(problem: Problem, *leading: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*leading, problem.channels, problem.states), FLOAT)
