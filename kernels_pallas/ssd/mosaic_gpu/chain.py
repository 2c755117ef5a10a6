"""The state of `ssd` through the chunks of a row: a block for each row and unit, which goes from chunk to chunk.

The state stays in registers, in float32. A chunk's outputs read it as it enters, and its tokens are added to it:
`y = (scores decays) x + seen (C S^T)`, `S' = kept S + (left x)^T B`. The gradient's chain is the second of the two from
the other end, with dy for x and C for B, and reads nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic
from kernels_pallas.ssd.mosaic_gpu.tiles import (
    BF16,
    BY_COLUMN,
    BY_ROW,
    CHUNK,
    PART,
    SLOTS,
    WGMMA,
    Call,
    between,
    broadcast,
    from_registers,
    launch,
    matrix,
    product,
    vectors,
    wide,
    zero,
)


def chain(call: Call, arrays: Mapping[str, jax.Array], initial: jax.Array, keep: bool) -> Any:
    """The state through the chunks of every row: from the first, or from the last where nothing reads it.

    Args:
      call: sizes.
      arrays: `values` [B*T, H*P], `keys` and, if outputs are asked for, `queries` [B*T, G*N]; `sums` and, with
        queries, `step` [B*H*T].
      initial: float32 [B*H*P, N].
      keep: whether the states that enter the chunks are wanted, in bfloat16 as products take them.

    Returns:
      `(outputs or None, final state, entering states [B*chunks*H*P, N] or None)`.
    """
    reads = 'queries' in arrays
    order = (lambda turn: turn) if reads else (lambda turn: call.chunks - 1 - turn)

    def body(ref):
        row, unit = lax.axis_index('rows'), lax.axis_index('units')
        head = call.head(unit)
        whole = pl.ds((row * call.units + unit) * PART, PART)

        def fetch(turn, slot):
            chunk = order(turn)
            boxes = {'values': call.values(row, chunk, unit)}
            boxes |= dict.fromkeys(('keys', 'queries'), call.by_group(row, chunk, lax.div(unit, call.in_group)))
            boxes |= dict.fromkeys(('sums', 'step'), call.vector(row, chunk, head, call.heads))
            copies = [(getattr(ref, name), boxes[name], getattr(ref, f'{name}_')) for name in arrays]
            mosaic.fetch(copies, slot, ref.arrived)

        def one(turn, state):
            slot, chunk = lax.rem(turn, SLOTS), order(turn)
            plgpu.barrier_wait(ref.arrived.at[slot])
            sums, total = mosaic.load(ref.sums_.at[slot], BY_ROW), ref.sums_[slot, CHUNK - 1]
            only = zero(total)
            values, scaled, entering = ref.values_.at[slot], ref.scaled_.at[only], ref.state_.at[only]
            # Results have left their places, and all threads have done with the last chunk.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(turn + 1 < call.chunks)
            def _():
                fetch(turn + 1, 1 - slot)

            entering[...] = state.astype(BF16)
            plgpu.commit_smem()
            if keep:
                mosaic.send(ref.state_, ref.states, call.state(row, chunk, unit), only)
            if reads:
                y = _read(ref, slot, entering, sums).astype(BF16)
                weight = jnp.exp2(total - sums) * mosaic.load(ref.step_.at[slot], BY_ROW)
            else:
                weight = jnp.exp2(sums)
            scaled[...] = (wide(values) * broadcast(weight, 0, PART)).astype(BF16)
            plgpu.commit_smem()

            def added(sum_):
                plgpu.wgmma(sum_, scaled.T, ref.keys_.at[slot])
                if reads:
                    values[...] = y  # all have read the values
                    plgpu.commit_smem()
                    mosaic.send(ref.values_, ref.y, call.values(row, chunk, unit), slot)
                return plgpu.wgmma_accumulator_load(sum_)

            return state * jnp.exp2(total) + pl.run_scoped(added, plgpu.ACC((PART, call.keys), jnp.float32))

        fetch(row * 0, 0)  # traced: see `mosaic.Tiles.start`
        state = lax.fori_loop(0, call.chunks, one, mosaic.load(ref.initial.at[whole], WGMMA))
        mosaic.store(ref.final.at[whole], state)
        plgpu.wait_smem_to_gmem(0)

    outputs = {'final': jax.ShapeDtypeStruct(initial.shape, jnp.float32)}
    if reads:
        outputs['y'] = jax.ShapeDtypeStruct(arrays['values'].shape, BF16)
    if keep:
        outputs['states'] = jax.ShapeDtypeStruct((call.chunks * initial.shape[0], call.keys), BF16)
    scratch = {'state_': matrix(1, PART, call.keys), 'scaled_': matrix(1, CHUNK, PART)}
    scratch |= {'values_': matrix(SLOTS, CHUNK, PART)}
    scratch |= {f'{name}_': matrix(SLOTS, CHUNK, call.keys) for name in ('keys', 'queries') if name in arrays}
    scratch |= {f'{name}_': vectors() for name in ('sums', 'step') if name in arrays}
    scratch |= {'arrived': plgpu.Barrier(num_arrivals=len(arrays), num_barriers=SLOTS)}
    name, grid = 'ssd_forward' if reads else 'ssd_turned', {'rows': call.batch, 'units': call.units}
    found = launch(name, call, body, {**arrays, 'initial': initial}, outputs, scratch, grid)
    return found.get('y'), found['final'], found.get('states')


def _read(ref: Any, slot: Any, entering: Any, sums: Any) -> Any:
    """A chunk's outputs [CHUNK, PART], of the state that enters it and of its own tokens."""
    queries = ref.queries_.at[slot]
    decays = between(sums, mosaic.load(ref.sums_.at[slot], BY_COLUMN))
    decays = decays * broadcast(mosaic.load(ref.step_.at[slot], BY_COLUMN), 1, CHUNK)
    weights = (product((CHUNK, CHUNK), queries, ref.keys_.at[slot].T) * decays).astype(BF16)

    def products(read, within):
        plgpu.wgmma(read, queries, entering.T)
        from_registers(ref, 0, within, weights, ref.values_.at[slot])
        seen = plgpu.wgmma_accumulator_load(read, wait_n=1) * broadcast(jnp.exp2(sums), 0, PART)
        return seen + plgpu.wgmma_accumulator_load(within)

    return pl.run_scoped(products, *(plgpu.ACC((CHUNK, PART), jnp.float32),) * 2)
