"""The gradients of a chunk of `ssd`: a block for each row, chunk and group, which goes through the group's units.

Two warpgroups compute, and each has the chunk's tokens for rows: as queries, for dC, or as keys, for dB and dx. Those
are the same with time turned round: queries read the tokens before them and the state that enters, keys are read by the
tokens after them and by way of the state that leaves. A third warpgroup fetches ahead.
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
    Call,
    between,
    broadcast,
    from_registers,
    iota,
    launch,
    matrix,
    product,
    vectors,
    wide,
    zero,
)

QUERIES, KEYS, FETCHES = range(3)  # warpgroups
COMPUTE_REGISTERS, FETCH_REGISTERS = 240, 24
VECTORS = ('later', 'across', 'strict', 'added', 'dstep')


def gradients(call: Call, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What a chunk's tokens get, of the states that enter it from either end.

    Args:
      call: sizes.
      arrays: `x`, `dy` [B*T, H*P], `keys`, `queries` [B*T, G*N]; `entering` and `leaving`, the states that enter a
        chunk and the gradients of those that leave it, as `chain` gives them; `sums`, `step` [B*H*T].

    Returns:
      `dx`, `dkeys`, `dqueries`, and `VECTORS` of each unit, flat [B*units*T] in float32. With D the weights between
      tokens times their gradients: `later`, what D has for a token of those before it and of the state that enters;
      `strict`, of those after it, and `added`, of the state that leaves, both without its step; `dstep`; and `across`,
      whose sum over a chunk is the product of both states.
    """

    def body(ref):
        place = tuple(lax.axis_index(name) for name in ('rows', 'chunks', 'groups'))
        thread = lax.axis_index('group')
        for side in (QUERIES, KEYS):

            @pl.when(thread == side)
            def _(side=side):
                plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
                _compute(call, ref, side, place)

        @pl.when(thread == FETCHES)
        def _():
            plgpu.set_max_registers(FETCH_REGISTERS, action='decrease')
            _fetch(call, ref, place)

    like = lambda name: jax.ShapeDtypeStruct(arrays[name].shape, BF16)
    outputs = {'dx': like('x'), 'dkeys': like('keys'), 'dqueries': like('queries')}
    outputs |= dict.fromkeys(VECTORS, jax.ShapeDtypeStruct((call.batch * call.units * call.length,), jnp.float32))
    scratch = {f'{name}_': matrix(1, CHUNK, call.keys) for name in ('queries', 'keys')}
    scratch |= {f'{name}_': matrix(SLOTS, CHUNK, PART) for name in ('x', 'dy')}
    scratch |= {f'{name}_': matrix(SLOTS, PART, call.keys) for name in ('entering', 'leaving')}
    scratch |= {f'{name}_': vectors() for name in ('sums', 'step')}
    scratch |= {'dx_': matrix(1, CHUNK, PART), 'sum_': matrix(2, CHUNK, call.keys)}
    scratch |= {
        'own': plgpu.Barrier(num_arrivals=2, num_barriers=1),
        'arrived': plgpu.Barrier(num_arrivals=6, num_barriers=SLOTS),
        'used': plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
    }
    grid = {'rows': call.batch, 'chunks': call.chunks, 'groups': call.groups}
    return launch('ssd_gradients', call, body, arrays, outputs, scratch, grid, threads=3)


def _fetch(call: Call, ref: Any, place: Any) -> None:
    row, chunk, group = place
    keys = call.by_group(row, chunk, group)
    mosaic.fetch([(ref.queries, keys, ref.queries_), (ref.keys, keys, ref.keys_)], 0, ref.own)

    def one(n, _):
        slot, unit = lax.rem(n, SLOTS), group * call.in_group + n

        @pl.when(n >= SLOTS)
        def _():
            plgpu.barrier_wait(ref.used.at[slot])

        boxes = dict.fromkeys(('x', 'dy'), call.values(row, chunk, unit))
        boxes |= dict.fromkeys(('entering', 'leaving'), call.state(row, chunk, unit))
        boxes |= dict.fromkeys(('sums', 'step'), call.vector(row, chunk, call.head(unit), call.heads))
        copies = [(getattr(ref, name), box, getattr(ref, f'{name}_')) for name, box in boxes.items()]
        mosaic.fetch(copies, slot, ref.arrived)

    lax.fori_loop(0, call.in_group, one, None)


def _compute(call: Call, ref: Any, side: int, place: Any) -> None:
    """dC or dB, in registers through all units."""
    plgpu.barrier_wait(ref.own.at[0])
    rows, columns = (ref.queries_, ref.keys_) if side == QUERIES else (ref.keys_, ref.queries_)

    def whole(sum_):
        scores = product((CHUNK, CHUNK), rows.at[0], columns.at[0].T)
        turn = lambda n, _: _turn(call, ref, side, place, n, rows, columns, scores, sum_)
        lax.fori_loop(0, call.in_group, turn, None)
        return sum_[...]

    value = pl.run_scoped(whole, plgpu.ACC((CHUNK, call.keys), jnp.float32))
    ref.sum_.at[side][...] = value.astype(BF16)
    plgpu.commit_smem()
    mosaic.send(ref.sum_, ref.dqueries if side == QUERIES else ref.dkeys, call.by_group(*place), side)
    plgpu.wait_smem_to_gmem(0)


def _turn(call: Call, ref: Any, side: int, place: Any, n: Any, rows: Any, columns: Any, scores: Any, sum_: Any) -> None:
    """A unit: its part of dC or dB, and what is its own.

    Args:
      call, ref, place: sizes, the kernel's arrays, and the block's row, chunk and group.
      side: what rows are, `QUERIES` or `KEYS`.
      n: which of the group's units.
      rows, columns: C and B, or B and C.
      scores: of rows by columns, float32 in registers.
      sum_: accumulates dC or dB.
    """
    row, chunk, group = place
    slot, unit = lax.rem(n, SLOTS), group * call.in_group + n
    (vector,) = call.vector(row, chunk, unit, call.units)
    give = lambda name, value: mosaic.store(getattr(ref, name).at[vector.ds], value)
    load = lambda name, layout: mosaic.load(getattr(ref, name).at[slot], layout)
    queries = side == QUERIES

    plgpu.barrier_wait(ref.arrived.at[slot])
    sums, total = load('sums_', BY_ROW), ref.sums_[slot, CHUNK - 1]
    only, step = zero(total), load('step_', BY_COLUMN if queries else BY_ROW)
    stepped = lambda tile: tile * broadcast(step, 1 if queries else 0, CHUNK)
    values, others, state = (ref.dy_, ref.x_, ref.entering_) if queries else (ref.x_, ref.dy_, ref.leaving_)
    values, others, state = values.at[slot], others.at[slot], state.at[slot]

    # Of the chunk's own tokens.
    def pairs(tile):
        plgpu.wgmma(tile, values, others.T)
        decays = between(sums, load('sums_', BY_COLUMN), turned=not queries)
        weights = (scores * decays).astype(BF16)
        plain = plgpu.wgmma_accumulator_load(tile) * decays
        both = scores * (stepped(plain) if queries else plain)
        strict = jnp.sum(jnp.where(iota(0) != iota(1), both, 0.0), 1)
        return stepped(plain).astype(BF16), weights, strict, jnp.sum(both, 1)

    dscores, weights, strict, all_ = pl.run_scoped(pairs, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
    from_registers(ref, side, sum_, dscores, columns.at[only])

    # Of the state.
    scale = jnp.exp2(sums if queries else total - sums)
    read = product((CHUNK, PART), rows.at[only], state.T) * broadcast(scale, 0, PART)
    mine = wide(values)
    of_state = jnp.sum(mine * read, 1)
    scale = scale if queries else scale * step
    from_registers(ref, side, sum_, (mine * broadcast(scale, 0, PART)).astype(BF16), state)

    if queries:
        give('later', strict + of_state)
        give('across', jnp.sum(wide(ref.entering_.at[slot]) * wide(ref.leaving_.at[slot]), 1))
        plgpu.commit_smem()  # before the copy engine overwrites what was read; the others do so for dx
    else:
        give('strict', strict)
        give('added', of_state)
        give('dstep', all_ + of_state)

        def within(dx):
            from_registers(ref, side, dx, weights, others)
            return plgpu.wgmma_accumulator_load(dx)

        dx = read + pl.run_scoped(within, plgpu.ACC((CHUNK, PART), jnp.float32))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        ref.dx_.at[only][...] = (dx * broadcast(step, 0, PART)).astype(BF16)
        plgpu.commit_smem()
        mosaic.send(ref.dx_, ref.dx, call.values(row, chunk, unit), only)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(ref.used.at[slot])
