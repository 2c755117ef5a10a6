"""Forward kernels of the selective scan: a thread a channel, its states in registers, time tiles through shared memory.

The same recurrence serves three uses: with outputs it is the scan; without, it gives the state that a slice of time ends
in (`carry`), or states at checkpoints; and run backwards it gives the slice's cotangent (`cocarry`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.selective_scan.mosaic_gpu.tiles import (
    CHANNELS,
    FLOAT,
    Copies,
    Problem,
    Spread,
    launch,
    sigmoid,
    softplus,
    store,
    thread_a_channel,
    where,
)

SLOTS = 2  # tiles of time in flight


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
        [B, D, N]; offset [B, T] (0, or FORGET where a document starts), padded to whole tiles; Zt [N, N] and g [N].
        z, offset, Zt and g only where the problem has them; C, D and z only with `read`.
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
    spread = Spread(thread_a_channel(problem.states), (CHANNELS,), problem.states)

    def body(ref: Any) -> None:
        row, block = lax.axis_index('row'), lax.axis_index('block')
        mine = pl.ds(block * CHANNELS, CHANNELS)
        copies = Copies(problem, tile, row, mine, ref, _rows(ref, inputs))
        A, bias = spread.load(ref.A.at[mine]), spread.load_channels(ref.bias.at[mine])
        skip = spread.load_channels(ref.D.at[mine]) if read and not problem.prior else None
        if readout:
            for n in range(problem.states):  # a few kilobytes, once a block
                store(ref.Zt_.at[n], spread.load_states(ref.Zt.at[n]))
            g = spread.over_channels(spread.load_states(ref.g))

        def scaled(h):
            """h * swish(h Z^T + g): a product over states, one column after the other out of shared memory."""
            store(ref.h_, h)  # a thread reads back what it wrote itself
            add = lambda n, s: (
                s
                + spread.over_states(spread.load_channels(ref.h_.at[:, n]))
                * spread.over_channels(spread.load_states(ref.Zt_.at[n]))
            )
            scores = lax.fori_loop(0, problem.states, add, g)
            return h * scores * sigmoid(scores)

        def step(index, slot, t, h):
            u = spread.load_channels(ref.u_.at[slot, t]).astype(FLOAT)
            dt = spread.load_channels(ref.dt_.at[slot, t]).astype(FLOAT) + bias
            dt = softplus(dt) if problem.softplus else dt
            if problem.length % tile:
                dt = dt * where(index * tile + t < problem.length, 1.0)
            B = spread.load_states(ref.B_.at[slot, t])
            C = spread.load_states(ref.C_.at[slot, t]) if read else None
            exponent = spread.over_states(dt) * A
            if problem.reset:
                exponent = exponent + _offset(ref, row, slot, index * tile + t, t)
            carried = jnp.exp2(exponent) * h
            h = carried + spread.over_states(dt * u) * spread.over_channels(B)
            if read:
                seen = carried if problem.prior else scaled(h) if readout else h
                y = jnp.sum(seen * spread.over_channels(C), axis=1)
                if not problem.prior:
                    y = y + skip * u
                if gate:
                    z = spread.load_channels(ref.z_.at[slot, t]).astype(FLOAT)
                    y = y * z * sigmoid(z)
                where_to = ref.y_.at[slot, t] if problem.tma else ref.y.at[row, index * tile + t, mine]
                store(where_to, y.astype(problem.dtype))
            return h

        def over_tile(index, h):
            slot = lax.rem(index, SLOTS)
            copies.wait(slot)

            @pl.when(index + 1 < tiles)
            def _():
                copies.start(index + 1, lax.rem(index + 1, SLOTS))

            def over_stretch(i, h):
                if 0 < checkpoint <= tile:
                    store(ref.states.at[row, index * (tile // stretch) + i, mine], h)

                def steps(k, h):
                    for j in range(unroll):
                        h = step(index, slot, i * stretch + k * unroll + j, h)
                    return h

                return lax.fori_loop(0, stretch // unroll, steps, h)

            if checkpoint > tile:

                @pl.when(lax.rem(index * tile, checkpoint) == 0)
                def _():
                    store(ref.states.at[row, lax.div(index * tile, checkpoint), mine], h)

            h = lax.fori_loop(0, tile // stretch, over_stretch, h)
            if read and problem.tma:
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(ref.y_.at[slot], ref.y.at[row, pl.ds(index * tile, tile), mine])
                plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
            return h

        if readout:
            copies.fence()
        copies.start(0, 0)
        h = lax.fori_loop(0, tiles, over_tile, spread.load(ref.state.at[row, mine]))
        store(ref.final.at[row, mine], h)
        if read and problem.tma:
            plgpu.wait_smem_to_gmem(0)

    outputs = {'final': _state(problem, problem.batch)}
    scratch = _scratch(problem, tile, inputs)
    if read:
        outputs['y'] = problem.tokens(problem.axes)
        if problem.tma:
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
      inputs: dy, dt, z [B, T, D]; C [B, T, N]; A, bias, offset as for `forward`.
      tile: steps a tile of time.
      unroll: steps written out in the innermost loop.
      interpret: parameters of the interpreter, for tests.

    Returns:
      [B, D, N].
    """
    tiles = -(-problem.length // tile)
    spread = Spread(thread_a_channel(problem.states), (CHANNELS,), problem.states)

    def body(ref: Any) -> None:
        row, block = lax.axis_index('row'), lax.axis_index('block')
        mine = pl.ds(block * CHANNELS, CHANNELS)
        copies = Copies(problem, tile, row, mine, ref, _rows(ref, inputs))
        A, bias = spread.load(ref.A.at[mine]), spread.load_channels(ref.bias.at[mine])

        def step(index, slot, t, g):
            dy = spread.load_channels(ref.dy_.at[slot, t]).astype(FLOAT)
            dt = spread.load_channels(ref.dt_.at[slot, t]).astype(FLOAT) + bias
            dt = softplus(dt) if problem.softplus else dt
            if problem.length % tile:
                dt = dt * where(index * tile + t < problem.length, 1.0)
            if problem.gate:
                z = spread.load_channels(ref.z_.at[slot, t]).astype(FLOAT)
                dy = dy * z * sigmoid(z)
            exponent = spread.over_states(dt) * A
            if problem.reset:
                exponent = exponent + _offset(ref, row, slot, index * tile + t, t)
            C = spread.over_channels(spread.load_states(ref.C_.at[slot, t]))
            return jnp.exp2(exponent) * (g + spread.over_states(dy) * C)

        def over_tile(k, g):
            index, slot = tiles - 1 - k, lax.rem(k, SLOTS)
            copies.wait(slot)

            @pl.when(k + 1 < tiles)
            def _():
                copies.start(index - 1, lax.rem(k + 1, SLOTS))

            def steps(i, g):
                for j in range(unroll):
                    g = step(index, slot, tile - 1 - (i * unroll + j), g)
                return g

            return lax.fori_loop(0, tile // unroll, steps, g)

        copies.start(tiles - 1, 0)
        store(ref.costate.at[row, mine], lax.fori_loop(0, tiles, over_tile, spread.zeros()))

    outputs = {'costate': _state(problem, problem.batch)}
    return launch('selective_scan_cocarry', problem, body, inputs, outputs, _scratch(problem, tile, inputs), interpret)[
        'costate'
    ]


def _rows(ref: Any, inputs: dict) -> list:
    """What is copied tile by tile: of the inputs, those that have a place in shared memory."""
    return [
        (getattr(ref, name), getattr(ref, f'{name}_'), name not in ('B', 'C', 'offset'))
        for name in ('u', 'dy', 'dt', 'z', 'B', 'C', 'offset')
        if name in inputs and hasattr(ref, f'{name}_')
    ]


def _offset(ref: Any, row: Any, slot: Any, time: Any, t: Any) -> Any:
    return ref.offset_[slot, t] if hasattr(ref, 'offset_') else ref.offset[row, time]


def _scratch(problem: Problem, tile: int, inputs: dict) -> dict:
    scratch = {}
    for name in ('u', 'dy', 'dt', 'z'):
        if name in inputs:
            scratch[f'{name}_'] = plgpu.SMEM((SLOTS, tile, CHANNELS), problem.dtype)
    for name in ('B', 'C'):
        if name in inputs:
            scratch[f'{name}_'] = plgpu.SMEM((SLOTS, tile, problem.states), FLOAT)
    if 'offset' in inputs and problem.tma and tile % 32 == 0:  # copies want 128 bytes
        scratch['offset_'] = plgpu.SMEM((SLOTS, tile), FLOAT)
    arrivals = len(scratch)
    if problem.tma:
        scratch['arrived'] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=SLOTS)
    return scratch


def _state(problem: Problem, *leading: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*leading, problem.channels, problem.states), FLOAT)
