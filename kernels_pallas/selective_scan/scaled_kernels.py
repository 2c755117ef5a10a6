"""The kernels of `scaled_mosaic_gpu`.

Both hold a channel's states on four lanes, four each, as the instruction for small products takes and returns them
(`state_products`): scores, what comes back through them, and the gradient of Z pass through no memory. No atomics.

A tile of 8 tokens goes through in phases: softplus, gate and drive, a thread a channel; then token by token, four lanes
a channel. The forward pass keeps the state before each tile. The backward pass takes the tiles from the last to the
first, replays each once for the states before every second token, and then two tokens at a time, whose states and
decays are in registers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic
from kernels_pallas.mosaic import Index, Span, Tiles, load, store
from kernels_pallas.selective_scan import state_products
from kernels_pallas.selective_scan.mosaic_gpu.tiles import (
    CHANNELS,
    FLOAT,
    LANES,
    LN2,
    WARPS,
    Problem,
    Spread,
    launch,
    plain,
    sigmoid,
    softplus,
    thread_a_channel_over_time,
)
from kernels_pallas.selective_scan.state_products import STATES, multiply, outer, split

# Tokens of a tile, and whose states are in registers at once; tiles in flight. Tiles of 16 in stretches of 4 would keep
# half as many states, but spill registers.
TILE, STRETCH, SLOTS = 8, 2, 2
FLAT = thread_a_channel_over_time(TILE)
SPREAD = Spread(state_products.LAYOUT, (WARPS, LANES), STATES)

Arrays = dict[str, jax.Array]


def forward(problem: Problem, inputs: Arrays, keep: bool, interpret: Any) -> Arrays:
    """`y`, `final` [B, D/32, 32, 16], and with `keep` the `states` [B, T/8, D/32, 32, 16] before each tile.

    Args:
      problem: sizes and options.
      inputs: of `_inputs`.
      keep: whether there is a gradient to come.
      interpret: of `mosaic.launch`.
    """

    def body(ref: Any) -> None:
        block = _Block(ref, problem, ('u', 'dt', *(('z',) if problem.gate else ()), 'B', 'C'), interpret)
        row, mine, copies = block.row, block.mine, block.copies
        A, g = SPREAD.load(ref.A.at[mine]), SPREAD.over_channels(SPREAD.load_states(ref.g))

        def over_tile(index, slot, h):
            if keep:
                store(ref.states.at[row, index, mine], h)
            step = block.steps(index, slot)[1]
            store(ref.step_, step)
            store(ref.x_, step * load(ref.u_.at[slot], FLAT).astype(FLOAT))
            copies.fence()

            def token(t, h):
                h, _ = block.after(slot, t, h, A)
                score = block.product(split(h, interpret), 'Zt', g)
                C = SPREAD.over_channels(SPREAD.load_states(ref.C_.at[slot, t]))
                store(ref.read_.at[t], jnp.sum(h * (score * sigmoid(score)) * C, axis=2))
                return h

            h = lax.fori_loop(0, TILE, token, h)
            copies.fence()
            y = load(ref.read_, FLAT) + block.over_time(ref.D) * load(ref.u_.at[slot], FLAT).astype(FLOAT)
            if problem.gate:
                z = load(ref.z_.at[slot], FLAT).astype(FLOAT)
                y = y * z * sigmoid(z)
            store(ref.y_.at[slot], y.astype(problem.dtype))
            plgpu.commit_smem()
            copies.send(ref.y_, ref.y, index, slot)
            plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
            return h

        block.begin(('Zt',))
        copies.begin()
        h = copies.fold(over_tile, SPREAD.load(ref.state.at[row, mine]))
        store(ref.final.at[row, mine], h)
        plgpu.wait_smem_to_gmem(0)

    states = lambda *lead: jax.ShapeDtypeStruct((problem.batch, *lead, *problem.warp_axes, STATES), FLOAT)
    outputs = {'y': problem.tokens(problem.warp_axes), 'final': states()}
    if keep:
        outputs['states'] = states(-(-problem.length // TILE))
    names = ('u', 'dt', 'z', 'B', 'C', 'A', 'D', 'bias', 'g', 'state', 'Zt', 'live')
    given = {name: inputs[name] for name in names if name in inputs}
    scratch = _scratch(problem, ('u', 'dt', 'z'), ('Zt',))
    scratch |= {name: plgpu.SMEM((TILE, WARPS, LANES), FLOAT) for name in ('step_', 'x_', 'read_')}
    scratch['y_'] = plgpu.SMEM((SLOTS, TILE, WARPS, LANES), problem.dtype)
    return launch('scaled_scan_forward', problem, body, given, outputs, scratch, interpret)


def backward(problem: Problem, inputs: Arrays, interpret: Any) -> Arrays:
    """The gradients, those of B and C by blocks [B, D/128, T in whole tiles, 16], of Z and g as lanes hold them.

    Args:
      problem: sizes and options.
      inputs: of `_inputs`, with `states` of `forward`, dy like y and dfinal like `final`.
      interpret: of `mosaic.launch`.
    """
    tiles, stretches = -(-problem.length // TILE), TILE // STRETCH

    def body(ref: Any) -> None:
        block = _Block(ref, problem, ('u', 'dt', 'dy', *(('z',) if problem.gate else ()), 'B', 'C'), interpret)
        row, mine, copies = block.row, block.mine, block.copies

        def back(index, slot, j, carry):
            """Through stretch j of a tile, from its last token to its first."""
            gradient, dA, dZ, dg = carry
            A, g = SPREAD.load(ref.A.at[mine]), SPREAD.over_channels(SPREAD.load_states(ref.g))
            h, after = SPREAD.load(ref.fine_.at[jnp.maximum(j - 1, 0)]), []
            for s in range(STRETCH):
                h, decay = block.after(slot, j * STRETCH + s, h, A)
                after.append((h, decay))
            for s in reversed(range(STRETCH)):
                t, (h, decay) = j * STRETCH + s, after[s]
                x = SPREAD.over_states(SPREAD.load_channels(ref.x_.at[t]))
                dy = SPREAD.over_states(SPREAD.load_channels(ref.dy_gated_.at[t]))
                B, C = (
                    SPREAD.over_channels(SPREAD.load_states(memory.at[slot, t, pl.ds(0, STATES)]))
                    for memory in (ref.B_, ref.C_)
                )
                states = split(h, interpret)
                score = block.product(states, 'Zt', SPREAD.zeros()) + g  # g as the first sum would spill registers here
                gate = sigmoid(score)
                scale = score * gate
                seen, read = h * scale, C * dy
                store(ref.dC_.at[t], jnp.sum(seen * dy, axis=1))
                if problem.gate:  # in the place of dy, which is read
                    store(ref.dy_gated_.at[t], jnp.sum(seen * C, axis=2))
                dscore = read * h * (gate + scale * (1.0 - gate))
                scores = split(dscore, interpret)
                gradient = gradient + block.product(scores, 'Z', read * scale)
                dZ = dZ + outer(scores, states, interpret)
                dg = dg + state_products.folded(dscore, interpret)
                store(ref.dB_.at[t], jnp.sum(gradient * x, axis=1))
                carried = gradient * (h - x * B)
                step = SPREAD.over_states(SPREAD.load_channels(ref.step_.at[t]))
                dA = dA + step * carried
                # Sums over states land where their inputs lay, which nobody needs any more.
                store(ref.x_.at[t], jnp.sum(gradient * B, axis=2))
                store(ref.step_.at[t], jnp.sum(carried * A, axis=2))
                gradient = decay * gradient
            return gradient, dA, dZ, dg

        def over_tile(k, carry):
            index, slot = tiles - 1 - k, lax.rem(k, SLOTS)
            copies.wait(slot)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the other slot still held results

            @pl.when(k + 1 < tiles)
            def _():
                copies.start(index - 1, lax.rem(k + 1, SLOTS))

            tokens = block.tokens(index, slot)
            store(ref.step_, tokens.step)
            store(ref.x_, tokens.step * load(ref.u_.at[slot], FLAT).astype(FLOAT))
            store(ref.dy_gated_, tokens.gated)
            copies.fence()

            kept = ref.states.at[row, index, mine]

            def replay(j, h):
                for s in range(STRETCH):
                    h, _ = block.after(slot, j * STRETCH + s, h, SPREAD.load(ref.A.at[mine]))
                store(ref.fine_.at[j], h)  # before stretch j + 1
                return h

            def one(k, rest):
                j = stretches - 1 - k
                rest = back(index, slot, j, rest)

                @pl.when(j == 1)  # its place is free now, and stretch 0 starts from the tile's own state
                def _():
                    store(ref.fine_.at[0], SPREAD.load(kept))

                return rest

            lax.fori_loop(0, stretches - 1, replay, SPREAD.load(kept))
            carry = lax.fori_loop(0, stretches, one, carry)
            copies.fence()
            times = pl.ds(index * TILE, TILE)
            for memory, out in ((ref.dB_, ref.dB), (ref.dC_, ref.dC)):
                a, b, c, d = (load(memory.at[:, warp], plain((TILE, STATES))) for warp in range(WARPS))
                store(out.at[row, lax.axis_index('block'), times], (a + b) + (c + d))

            # The steps' inputs once more, from their source: their place holds the sums over states now.
            raw, step, dy, gated, z, gate = block.tokens(index, slot)
            skip = block.over_time(ref.D)
            u, live = load(ref.u_.at[slot], FLAT).astype(FLOAT), block.live(index)
            dx = load(ref.x_, FLAT)
            ddt = load(ref.step_, FLAT) * LN2 + dx * u
            if problem.softplus:
                ddt = ddt * sigmoid(raw)
            if live is not None:
                ddt = ddt * live
            results = {'u': dx * step + gated * skip, 'dt': ddt}
            if problem.gate:
                results['z'] = dy * (load(ref.dy_gated_, FLAT) + skip * u) * gate * (1.0 + z * (1.0 - gate))
            for name, value in results.items():
                store(getattr(ref, f'{name}_').at[slot], value.astype(problem.dtype))
            plgpu.commit_smem()
            for name in results:
                copies.send(getattr(ref, f'{name}_'), getattr(ref, f'd{name}'), index, slot)
            for memory, value in ((ref.dD_, gated * u), (ref.dbias_, ddt)):
                store(memory, load(memory, FLAT.reduce(0)) + jnp.sum(value, axis=0))
            return carry

        block.begin(('Z', 'Zt'))
        copies.begin(reverse=True)
        none = lambda shape, layout: plgpu.layout_cast(jnp.zeros(shape, FLOAT), layout)
        for memory in (ref.dD_, ref.dbias_):
            store(memory, none((WARPS, LANES), FLAT.reduce(0)))
        carry = [SPREAD.load(ref.dfinal.at[row, mine]), SPREAD.zeros()]
        carry += [none((WARPS, LANES, 8), state_products.SUMS), none((WARPS, 8, STATES), state_products.FOLDED)]
        found = lax.fori_loop(0, tiles, over_tile, tuple(carry))
        copies.fence()  # sums by channels are read once more, by whom a load gives them to
        for memory, out in ((ref.dD_, ref.dD), (ref.dbias_, ref.dbias)):
            store(out.at[row, mine], load(memory, FLAT.reduce(0)))
        for out, value in zip((ref.dstate, ref.dA, ref.dZ, ref.dg), found, strict=True):
            store(out.at[row, mine], value)
        plgpu.wait_smem_to_gmem(0)

    batch, axes = problem.batch, problem.warp_axes
    number = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), FLOAT)
    outputs = {f'd{name}': problem.tokens(axes) for name in ('u', 'dt', *(('z',) if problem.gate else ()))}
    outputs |= dict.fromkeys(('dB', 'dC'), number(problem.channels // CHANNELS, tiles * TILE, STATES))
    outputs |= dict.fromkeys(('dA', 'dstate'), number(*axes, STATES)) | dict.fromkeys(('dD', 'dbias'), number(*axes))
    outputs |= {'dZ': number(axes[0], LANES, 8), 'dg': number(axes[0], 8, STATES)}
    names = ('u', 'dt', 'dy', 'z', 'B', 'C', 'A', 'D', 'bias', 'g', 'states', 'dfinal', 'Z', 'Zt', 'live')
    given = {name: inputs[name] for name in names if name in inputs}
    scratch = _scratch(problem, ('u', 'dt', 'dy', 'z'), ('Z', 'Zt'))
    scratch |= {name: plgpu.SMEM((TILE, WARPS, LANES), FLOAT) for name in ('step_', 'x_', 'dy_gated_')}
    scratch |= {name: plgpu.SMEM((TILE, WARPS, STATES), FLOAT) for name in ('dB_', 'dC_')}
    scratch |= {name: plgpu.SMEM((WARPS, LANES), FLOAT) for name in ('dD_', 'dbias_')}
    scratch['fine_'] = plgpu.SMEM((stretches - 1, WARPS, LANES, STATES), FLOAT)
    return launch('scaled_scan_backward', problem, body, given, outputs, scratch, interpret)


# ------------------------------------------------------------------------------------------------------ what they share
class _Tokens(NamedTuple):
    """Of a tile's tokens, a thread a channel."""

    raw: jax.Array  # dt with its bias
    step: jax.Array
    dy: jax.Array
    gated: jax.Array  # what of dy passes the gate
    z: jax.Array | None = None
    gate: jax.Array | None = None  # sigmoid(z)


class _Block:
    """A block's row and channels, its copies of tiles, and the steps of both passes."""

    def __init__(self, ref: Any, problem: Problem, fetched: tuple[str, ...], interpret: Any) -> None:
        self._ref, self._problem, self._interpret = ref, problem, interpret
        self.row, channels = lax.axis_index('row'), Span(Index(lax.axis_index('block')) * WARPS, WARPS)
        self.mine = channels.ds
        tiles = -(-problem.length // TILE)
        self.copies = Tiles(ref, TILE, tiles, self.row, channels, fetched, whole=('B', 'C'))

    def begin(self, factors: tuple[str, ...]) -> None:
        """Brings the factors of products to shared memory: every thread its own fragments."""
        for name in factors:
            for part in range(2):
                fragment = load(getattr(self._ref, name).at[part], state_products.BY_LANE)
                store(getattr(self._ref, f'{name}_').at[part], fragment)

    def product(self, x: state_products.Parts, factor: str, initial: jax.Array) -> jax.Array:
        """`initial` and the product of states with a factor that `begin` brought."""
        memory = getattr(self._ref, f'{factor}_')
        high, low = (load(memory.at[part], state_products.BY_LANE) for part in range(2))
        return multiply(x, (high, low), initial, self._interpret)

    def over_time(self, ref: Any) -> jax.Array:
        """A number a channel, for every token of a tile."""
        return _over_time(load(ref.at[self.mine], FLAT.reduce(0)), (1, 2))

    def live(self, index: Any) -> jax.Array | None:
        """1 for the tokens of a tile and 0 behind the end, or None where tiles are whole."""
        if self._problem.length % TILE == 0:
            return None
        return _over_time(load(self._ref.live.at[pl.ds(index * TILE, TILE)], FLAT.reduce((1, 2))), (0,))

    def steps(self, index: Any, slot: Any) -> tuple[jax.Array, jax.Array]:
        """dt with its bias, and the step sizes, of a tile."""
        raw = load(self._ref.dt_.at[slot], FLAT).astype(FLOAT) + self.over_time(self._ref.bias)
        step, live = softplus(raw) if self._problem.softplus else raw, self.live(index)
        return raw, step if live is None else step * live

    def tokens(self, index: Any, slot: Any) -> _Tokens:
        """What a tile's gradient starts from and ends in, anew from its source."""
        dy = load(self._ref.dy_.at[slot], FLAT).astype(FLOAT)
        raw, step = self.steps(index, slot)
        if not self._problem.gate:
            return _Tokens(raw, step, dy, dy)
        z = load(self._ref.z_.at[slot], FLAT).astype(FLOAT)
        gate = sigmoid(z)
        return _Tokens(raw, step, dy, dy * z * gate, z, gate)

    def after(self, slot: Any, t: Any, h: jax.Array, A: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The state after token t of a tile, and its decay."""
        ref = self._ref
        exponent = SPREAD.over_states(SPREAD.load_channels(ref.step_.at[t])) * A
        if self._problem.reset:
            exponent = exponent + ref.B_[slot, t, STATES]
        decay = jnp.exp2(exponent)
        x, B = SPREAD.load_channels(ref.x_.at[t]), SPREAD.load_states(ref.B_.at[slot, t, pl.ds(0, STATES)])
        return decay * h + SPREAD.over_states(x) * SPREAD.over_channels(B), decay


def _over_time(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (TILE, WARPS, LANES), axes), FLAT)


def _scratch(problem: Problem, tokens: tuple[str, ...], factors: tuple[str, ...]) -> dict:
    by_token: dict[str, Any] = {name: ((WARPS, LANES), problem.dtype) for name in tokens if name != 'z' or problem.gate}
    by_token |= {'B': ((problem.columns,), FLOAT), 'C': ((STATES,), FLOAT)}
    fragments = {f'{name}_': plgpu.SMEM((2, LANES, 4), jnp.int32) for name in factors}
    return mosaic.slots(TILE, by_token, SLOTS) | fragments
