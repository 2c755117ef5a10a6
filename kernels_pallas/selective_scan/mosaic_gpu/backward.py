"""The backward kernel of the selective scan: deterministic, without atomics.

The forward pass keeps the state before every tile of time. From the last tile to the first, a block of 128 channels
replays the tile in two steps: once for the states before every stretch of a few tokens, which stay in shared memory,
and then stretch by stretch with all its states in registers, through which the cotangent runs back. Gradients of B and
C are sums over channels: a block writes its partial sums, and they are added outside in a fixed order.
"""

import math
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
    LANES,
    LN2,
    WARPS,
    Problem,
    Spread,
    lanes_over_states,
    launch,
    plain,
    sigmoid,
    softplus,
    states_by_states,
    thread_a_channel_over_time,
)


def backward(
    problem: Problem, inputs: dict[str, jax.Array], *, tile: int, stretch: int, interpret: Any = None
) -> dict[str, jax.Array]:
    """Runs the cotangents back.

    Args:
      problem: sizes and options; with a readout, 16 states.
      inputs: u, dt, z, dy [B, T, D/32, 32]; B, C [B, T, N]; A [D/32, 32, N] in base 2; D, bias [D/32, 32]; states
        [B, T/tile, D/32, 32, N], as `forward` stored them; dfinal [B, D/32, 32, N];
        live [T], 1 for tokens and 0 behind the end, where T is not a whole number of tiles; Z, Zt [N, N] (Zt its
        transpose) and g [N]. z, live, Z, Zt and g only where the problem has them. With resets B is
        `tiles.with_offset`.
      tile: steps between states.
      stretch: steps whose states are in registers at once; divides tile, and is less.
      interpret: parameters of the interpreter, for tests.

    Returns:
      `du`, `ddt`, `dz` like u, dz only with a gate; `dB`, `dC` [B, D/128, T in whole tiles, N]; `dA` (by A in base e),
      `dstate` [B, D/32, 32, N]; `dD`, `dbias` [B, D/32, 32]; with a readout `dZ` [B, D/32, N, N] and `dg` [B, D/32, N],
      by warps.
    """
    width, parts, _ = _divided(problem)
    tiles, stretches = -(-problem.length // tile), tile // stretch
    spread = Spread(lanes_over_states(width), (WARPS, LANES), width)
    flat = thread_a_channel_over_time(tile)
    over_time = lambda x: plgpu.layout_cast(lax.broadcast_in_dim(x, (tile, WARPS, LANES), (1, 2)), flat)
    matrix = states_by_states(width) if problem.readout else None

    def body(ref: Any) -> None:
        row, block = lax.axis_index('row'), lax.axis_index('block')
        channels = Span(Index(block) * WARPS, WARPS)
        fetched = ['u', 'dt', 'dy', *(['z'] if problem.gate else []), 'B', 'C']
        copies, mine = Tiles(ref, tile, tiles, row, channels, fetched, whole=('B', 'C')), channels.ds
        bias, skip = (over_time(load(x.at[mine], flat.reduce(0))) for x in (ref.bias, ref.D))
        no_sum = plgpu.layout_cast(jnp.zeros((WARPS, LANES), FLOAT), flat.reduce(0))
        # Sums over states land where their inputs lay, which nobody needs any more; several parts need them all.
        dx_, ddecay_, y_ = (ref.x_, ref.step_, ref.dy_gated_) if parts == 1 else (ref.dx_, ref.ddecay_, ref.sum_)

        def _states(memory, slot, t, part=0):
            return memory.at[slot, t, pl.ds(part * width, width)]

        def over_part(index, slot, part, g, dA, extra):
            states = slice(None) if parts == 1 else pl.ds(part * width, width)
            A = spread.load(ref.A.at[mine, :, states])
            kept = ref.states.at[row, index, mine, :, states]

            def one(t, h):
                exponent = spread.over_states(spread.load_channels(ref.step_.at[t])) * A
                if problem.reset:
                    exponent = exponent + ref.B_[slot, t, problem.states]
                decay = jnp.exp2(exponent)
                x = spread.load_channels(ref.x_.at[t])
                B = spread.load_states(_states(ref.B_, slot, t, part))
                return decay * h + spread.over_states(x) * spread.over_channels(B), decay

            def replay(j, h):
                for s in range(stretch):
                    h, _ = one(j * stretch + s, h)
                store(ref.fine_.at[j], h)  # before stretch j + 1
                return h

            lax.fori_loop(0, stretches - 1, replay, spread.load(kept))

            def back(k, carry):
                j = stretches - 1 - k
                g, dA, extra = carry
                h, hs, decays = spread.load(ref.fine_.at[jnp.maximum(j - 1, 0)]), [], []
                for s in range(stretch):
                    h, decay = one(j * stretch + s, h)
                    hs.append(h)
                    decays.append(decay)
                if problem.readout:
                    extra = _readout(ref, problem, spread, matrix, copies, slot, j * stretch, hs, y_, extra)
                for s in reversed(range(stretch)):
                    t, h = j * stretch + s, hs[s]
                    dt, x = (spread.load_channels(m.at[t]) for m in (ref.step_, ref.x_))
                    B = spread.over_channels(spread.load_states(_states(ref.B_, slot, t, part)))
                    wide_x = spread.over_states(x)
                    carried = h - wide_x * B
                    reads = g  # the cotangent of this token's state, by what reads it
                    if problem.readout:
                        reads = g = g + spread.load(ref.inject_.at[s])
                    else:
                        C = spread.over_channels(spread.load_states(_states(ref.C_, slot, t, part)))
                        dy = spread.over_states(spread.load_channels(ref.dy_gated_.at[t]))
                        g = g + C * dy
                        reads = reads if problem.prior else g  # a prior is read before the token's own input
                        seen = carried if problem.prior else h
                        store(ref.dC_.at[t], jnp.sum(seen * dy, axis=1))
                        if problem.gate:
                            _put(y_, t, jnp.sum(seen * C, axis=2), spread, parts)
                    store(ref.dB_.at[t], jnp.sum(reads * wide_x, axis=1))
                    carried = g * carried
                    _put(dx_, t, jnp.sum(reads * B, axis=2), spread, parts)
                    _put(ddecay_, t, jnp.sum(carried * A, axis=2), spread, parts)
                    dA = dA + spread.over_states(dt) * carried
                    g = decays[s] * g

                @pl.when(j == 1)  # its place is free now, and stretch 0 starts from the tile's own state
                def _():
                    store(ref.fine_.at[0], spread.load(kept))

                return g, dA, extra

            g, dA, extra = lax.fori_loop(0, stretches, back, (g, dA, extra))
            copies.fence()
            times = pl.ds(index * tile, tile)
            for memory, out in ((ref.dB_, ref.dB), (ref.dC_, ref.dC)):
                a, b, c, d = (load(memory.at[:, w], plain((tile, width))) for w in range(WARPS))
                store(out.at[row, block, times, states], (a + b) + (c + d))
            return g, dA, extra

        def over_tile(k, carry):
            index, slot = tiles - 1 - k, lax.rem(k, copies.slots)
            times = pl.ds(index * tile, tile)
            if copies.slots == 1:
                copies.fence()
                copies.start(index, slot)
            copies.wait(slot)
            if copies.slots > 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the other slot still held results

                @pl.when(k + 1 < tiles)
                def _():
                    copies.start(index - 1, lax.rem(k + 1, copies.slots))

            def tokens():
                """What the steps need of every token, once for all states."""
                raw = load(ref.dt_.at[slot], flat).astype(FLOAT) + bias
                step = softplus(raw) if problem.softplus else raw
                live = None
                if problem.length % tile:
                    live = load(ref.live.at[times], flat.reduce((1, 2)))
                    live = plgpu.layout_cast(lax.broadcast_in_dim(live, (tile, WARPS, LANES), (0,)), flat)
                    step = step * live
                dy = load(ref.dy_.at[slot], flat).astype(FLOAT)
                z = load(ref.z_.at[slot], flat).astype(FLOAT) if problem.gate else None
                return raw, step, live, load(ref.u_.at[slot], flat).astype(FLOAT), dy, z

            raw, step, _, u, dy, z = tokens()
            store(ref.step_, step)
            store(ref.x_, step * u)
            store(ref.dy_gated_, dy * z * sigmoid(z) if problem.gate else dy)
            if parts > 1:
                for memory in (dx_, ddecay_, y_):
                    store(memory, plgpu.layout_cast(jnp.zeros((tile, WARPS, LANES), FLOAT), flat))
            copies.fence()

            dD, dbias, *rest = carry
            if parts == 1:
                g, dA, extra = over_part(index, slot, 0, *rest)
                rest = [g, dA, extra]
            else:

                def one_part(part, _):
                    g, dA = spread.load(ref.g_.at[part]), spread.load(ref.dA_.at[part])
                    g, dA, _ = over_part(index, slot, part, g, dA, ())
                    store(ref.g_.at[part], g)
                    store(ref.dA_.at[part], dA)
                    copies.fence()  # the partial sums have been read
                    return ()

                lax.fori_loop(0, parts, one_part, ())

            # The steps' inputs once more, from their source: their place holds the sums over states now.
            raw, step, live, u, dy, z = tokens()
            dx, ddecay = load(dx_, flat), load(ddecay_, flat)
            gate = sigmoid(z) if problem.gate else None
            dy_gated = dy * z * gate if problem.gate else dy
            ddt = ddecay * LN2 + dx * u
            if problem.softplus:
                ddt = ddt * sigmoid(raw)
            if live is not None:
                ddt = ddt * live
            dD = dD + jnp.sum(dy_gated * u, axis=0)
            dbias = dbias + jnp.sum(ddt, axis=0)
            results = {'u': dx * step if problem.prior else dx * step + dy_gated * skip, 'dt': ddt}
            if problem.gate:
                results['z'] = dy * (load(y_, flat) + skip * u) * gate * (1.0 + z * (1.0 - gate))
            for name, value in results.items():
                staged = getattr(ref, f'{name}_').at[slot]
                final = getattr(ref, f'd{name}').at[row, times, mine]
                store(staged if problem.tma else final, value.astype(problem.dtype))
            if problem.tma:
                plgpu.commit_smem()
                for name in results:
                    copies.send(getattr(ref, f'{name}_'), getattr(ref, f'd{name}'), index, slot)
            return dD, dbias, *rest

        extra: tuple = ()
        if problem.readout:
            for n in range(width):
                store(ref.Z_.at[n], spread.load_states(ref.Z.at[n]))
                store(ref.Zt_.at[n], spread.load_states(ref.Zt.at[n]))
            zeros = plgpu.layout_cast(jnp.zeros((WARPS, width, width), FLOAT), matrix)
            extra = (zeros, plgpu.layout_cast(jnp.zeros((WARPS, width), FLOAT), matrix.reduce(2)))
            copies.fence()
        if copies.slots > 1:
            copies.begin(reverse=True)
        if parts == 1:
            initial: tuple = (spread.load(ref.dfinal.at[row, mine]), spread.zeros(), extra)
        else:
            initial = ()
            for part in range(parts):
                store(ref.g_.at[part], spread.load(ref.dfinal.at[row, mine, :, pl.ds(part * width, width)]))
                store(ref.dA_.at[part], spread.zeros())
        dD, dbias, *rest = lax.fori_loop(0, tiles, over_tile, (no_sum, no_sum, *initial))
        store(ref.dD.at[row, mine], dD)
        store(ref.dbias.at[row, mine], dbias)
        if parts == 1:
            g, dA, extra = rest
            store(ref.dstate.at[row, mine], g)
            store(ref.dA.at[row, mine], dA)
        else:
            for part in range(parts):
                states = pl.ds(part * width, width)
                store(ref.dstate.at[row, mine, :, states], spread.load(ref.g_.at[part]))
                store(ref.dA.at[row, mine, :, states], spread.load(ref.dA_.at[part]))
        if problem.readout:
            dZ, dg = extra
            store(ref.dZ.at[row, mine], dZ)
            store(ref.dg.at[row, mine], dg)
        if problem.tma:
            plgpu.wait_smem_to_gmem(0)

    outputs = _outputs(problem, tiles * tile)
    scratch = _scratch(problem, tile, stretch)
    return launch('selective_scan_backward', problem, body, inputs, outputs, scratch, interpret)


def _put(memory: Any, t: Any, value: jax.Array, spread: Spread, parts: int) -> None:
    """Stores a sum over this part's states, or adds it to the other parts'."""
    store(memory.at[t], value if parts == 1 else value + spread.load_channels(memory.at[t]))


def _readout(ref, problem, spread, matrix, copies, slot, first, hs, y_, extra):
    """The gradient of `y = sum_m h_m swish(Z h + g)_m C_m` by the states of a stretch, into `inject_`.

    Products over states go column by column through shared memory, for lanes hold a channel's states by fours.
    """
    width = problem.states
    steps = len(hs)
    wide, deep = spread.over_states, spread.over_channels
    dZ, dg = extra

    def product(memory, rows, initial):
        add = lambda n, total: (
            total + wide(spread.load_channels(memory.at[:, :, n])) * deep(spread.load_states(rows.at[n]))
        )
        return lax.fori_loop(0, width, add, initial)

    for s, h in enumerate(hs):
        store(ref.h_.at[s], h)
    copies.fence()
    bias = deep(spread.load_states(ref.g))

    def scores(s):
        h = spread.load(ref.h_.at[s])
        dy = wide(spread.load_channels(ref.dy_gated_.at[first + s]))
        C = deep(spread.load_states(ref.C_.at[slot, first + s]))
        score = product(ref.h_.at[s], ref.Zt_, bias)
        gate = sigmoid(score)
        scale = score * gate
        seen, read = h * scale, C * dy
        store(ref.dC_.at[first + s], jnp.sum(seen * dy, axis=1))
        dscore = read * h * (gate * (1.0 + score * (1.0 - gate)))
        store(ref.inject_.at[s], read * scale)
        store(ref.dscore_.at[s], dscore)
        if problem.gate:  # last: it takes the place of dy
            store(y_.at[first + s], jnp.sum(seen * C, axis=2))

    lax.fori_loop(0, steps, lambda s, _: scores(s), None)
    copies.fence()

    def spread_back(s, carry):
        store(ref.inject_.at[s], product(ref.dscore_.at[s], ref.Z_, spread.load(ref.inject_.at[s])))

        def outer(d, carry):
            dZ, dg = carry
            shape = (WARPS, width, width)
            row, column = load(ref.dscore_.at[s, :, d], matrix.reduce(2)), load(ref.h_.at[s, :, d], matrix.reduce(1))
            rows = plgpu.layout_cast(lax.broadcast_in_dim(row, shape, (0, 1)), matrix)
            columns = plgpu.layout_cast(lax.broadcast_in_dim(column, shape, (0, 2)), matrix)
            return dZ + rows * columns, dg + row

        return lax.fori_loop(0, LANES, outer, carry)

    dZ, dg = lax.fori_loop(0, steps, spread_back, (dZ, dg))
    copies.fence()  # the next stretch writes h_ anew
    return dZ, dg


def _outputs(problem: Problem, padded: int) -> dict:
    batch, states, axes = problem.batch, problem.states, problem.warp_axes
    number = lambda *shape: jax.ShapeDtypeStruct(shape, FLOAT)
    outputs = {'du': problem.tokens(axes), 'ddt': problem.tokens(axes)}
    if problem.gate:
        outputs['dz'] = problem.tokens(axes)
    outputs |= dict.fromkeys(('dB', 'dC'), number(batch, problem.channels // CHANNELS, padded, states))
    outputs |= dict.fromkeys(('dA', 'dstate'), number(batch, *axes, states))
    outputs |= dict.fromkeys(('dD', 'dbias'), number(batch, *axes))
    if problem.readout:
        outputs |= {'dZ': number(batch, axes[0], states, states), 'dg': number(batch, axes[0], states)}
    return outputs


def shared_bytes(problem: Problem, tile: int, stretch: int) -> int:
    """Shared memory that a block of this kernel takes; no other kernel takes as much."""
    memory = [part for part in _scratch(problem, tile, stretch).values() if not isinstance(part, plgpu.Barrier)]
    return sum(math.prod(part.shape) * jnp.dtype(part.dtype).itemsize for part in memory)


def _divided(problem: Problem) -> tuple[int, int, int]:
    """States handled together, how many parts of those there are, and tiles of time in flight."""
    width = 16 if problem.states % 16 == 0 else 8
    return width, problem.states // width, 2 if problem.tma else 1


def _scratch(problem: Problem, tile: int, stretch: int) -> dict:
    width, parts, slots = _divided(problem)
    memory = lambda *shape: plgpu.SMEM(shape, FLOAT)
    fetched: dict[str, Any] = dict.fromkeys(('u', 'dt', 'dy'), ((WARPS, LANES), problem.dtype))
    if problem.gate:
        fetched['z'] = fetched['u']
    fetched |= {'B': ((problem.columns,), FLOAT), 'C': ((problem.states,), FLOAT)}
    scratch = mosaic.slots(tile, fetched, slots, engine=problem.tma)
    per_token = ('step_', 'x_', 'dy_gated_', *(('dx_', 'ddecay_', 'sum_') if parts > 1 else ()))
    scratch |= {name: memory(tile, WARPS, LANES) for name in per_token}
    scratch |= {name: memory(tile, WARPS, width) for name in ('dB_', 'dC_')}
    scratch['fine_'] = memory(tile // stretch - 1, WARPS, LANES, width)
    if parts > 1:
        scratch |= {name: memory(parts, WARPS, LANES, width) for name in ('g_', 'dA_')}
    if problem.readout:
        scratch |= {name: memory(width, width) for name in ('Z_', 'Zt_')}
        scratch |= {name: memory(stretch, WARPS, LANES, width) for name in ('h_', 'dscore_', 'inject_')}
    return scratch
