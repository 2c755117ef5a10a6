"""The diagonal gain on NVIDIA GPUs: every array is read and written once a pass (Pallas Mosaic GPU).

With `g = l alpha`, M the head's mean square plus EPS and `w = g / M`, the law of a channel is affine,

    r = K e,     b = min(g, w e^2),     a = l - b,     K <- a K + b.

A block takes 128 channels or more of a row through time, tile by tile, in phases: w of the whole tile, in parallel;
then a thread a channel, from token to token, which is little more than a multiplication and an addition. The forward
pass that has a gradient keeps the gain before each tile. The backward pass takes the tiles from the last to the first:
w; the gains of the tile anew; D, the gradient of the gain that a token reads, `D <- a D + dr e`; then everything else
in parallel, the sums over a head's channels included.

Few rows and heads would leave most of the GPU idle. There time is cut into segments: a pass before each finds what a
segment does to its gain (or to D), from which follows what every segment starts with. No atomics.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic, platform
from kernels_pallas.adaptive_gain.reference import EPS
from kernels_pallas.mosaic import Index, Span, load, store

WIDTHS = (16, 32, 64)
THREADS, WARPS = 128, 4
TILE = 16  # tokens; also from one kept gain to the next
BLOCKS = 264  # two for each of 132 multiprocessors; with fewer than half of them, time is cut
SHORTEST, MOST = 8, 32  # tiles of a segment at least, segments at most


def unsupported(dtype: Any, width: int) -> str | None:
    """Why these arguments cannot run here, or None."""
    capability = platform.compute_capability()
    if capability is None:
        return f'it needs an NVIDIA GPU, and this is for {platform.platform()}'
    if capability < (9, 0):
        return f'it needs compute capability 9.0 or newer, and this GPU has {capability[0]}.{capability[1]}'
    if dtype == jnp.float64:
        return 'it computes in float32, and an input is float64'
    if width not in WIDTHS:
        return f'it holds heads of {", ".join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]} channels, not {width}'
    return None


def variants(width: int) -> tuple[str, ...]:
    """The kernels that a call runs, by the name of their card."""
    return (f'diagonal{width}',)


def diagonal(e, alpha, log_decay, reset, initial_gain, segments=None, interpret=None):
    """`K_k e_k` and the final gain; shapes as in `reference.diagonal`, float32, reset may be None, any H and T.

    Args:
      e, alpha, log_decay, reset, initial_gain: of the call.
      segments: of time; None for as many as fill a GPU.
      interpret: of `mosaic.launch`.
    """
    keep = jnp.exp(log_decay)
    if reset is not None:
        # The gain that a first token reads is zero if its predecessor forgets everything and learns nothing.
        ends = jnp.pad(reset[:, 1:], ((0, 0), (0, 1)))[..., None]
        keep = jnp.where(ends, 0, keep)
        initial_gain = jnp.where(reset[:, 0, None, None], 0, initial_gain)
    batch, length, heads, width = e.shape
    block = _Layouts(width).heads
    # A tile of all heads is one run of bytes, which must not lead over the end of its row (mosaic.Copy.runs_on), nor of
    # a single row, which has others behind it where the call is vmapped.
    time = -length % TILE if heads <= block else 0
    pad = lambda x, *widths: jnp.pad(x, [*((0, width) for width in widths), *((0, 0),) * (x.ndim - len(widths))])
    tokens = lambda x: pad(x, 0, time, -heads % block)  # with zeros, which leave the gain as it is
    if segments is None:
        segments = default_segments(batch * -(-heads // block), length)
    # 1 - l, so that tokens beyond the last, filled with zeros, change nothing.
    out, gain = _gain(
        tokens(e), tokens(keep * alpha), tokens(1 - keep), pad(initial_gain, 0, -heads % block), segments, interpret
    )
    return out[:, :length, :heads], gain[:, :heads]


def default_segments(blocks: int, length: int) -> int:
    """Segments of time where a segment has so many blocks: one if they fill half of `BLOCKS`."""
    if 2 * blocks > BLOCKS:
        return 1
    return max(1, min(-(-BLOCKS // blocks), -(-length // TILE) // SHORTEST, MOST))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gain(e, gain_step, forget, initial, segments, interpret):
    cut = _Cut.of(e, segments)
    found, _ = _forward(cut, e, gain_step, forget, initial, False, interpret)
    return found['read'], found['final'][:, -1]


def _gain_forward(e, gain_step, forget, initial, segments, interpret):
    cut = _Cut.of(e, segments)
    found, shrink = _forward(cut, e, gain_step, forget, initial, True, interpret)
    return (found['read'], found['final'][:, -1]), (e, gain_step, forget, found['gains'], shrink)


def _gain_backward(segments, interpret, kept, cotangents):
    e, gain_step, forget, gains, shrink = kept
    dread, dfinal = cotangents
    cut = _Cut.of(e, segments)
    inputs = {'e': e, 'step': gain_step, 'forget': forget, 'dread': dread}
    leaving = dfinal[:, None]
    if cut.segments > 1:
        grown = _carry(cut, inputs, True, interpret)['grown']
        leaving = _entering(shrink[:, ::-1], grown[:, ::-1], dfinal)[:, ::-1]
    found = _backward(cut, inputs | {'gains': gains, 'leaving': leaving}, interpret)
    return found['de'], found['dstep'], found['dforget'], found['dinitial'][:, 0]


_gain.defvjp(_gain_forward, _gain_backward)


def _entering(shrink, grown, first):
    """What each segment starts with [B, segments, H, P], by `x <- shrink x + grown` from `first`."""
    values = [first]
    for k in range(shrink.shape[1] - 1):
        values.append(shrink[:, k] * values[-1] + grown[:, k])
    return jnp.stack(values, 1)


# ------------------------------------------------------------------------------------------------- shapes and layouts
@dataclass(frozen=True)
class _Layouts:
    """Layouts of one kernel's arrays, and loads and broadcasts between them."""

    width: int

    @property
    def heads(self) -> int:  # of a block; the copy engine wants four numbers in a row
        return max(4, THREADS // self.width)

    @property
    def tile(self):  # [TILE, heads, width]: a warp has a quarter of the tokens, a lane neighbouring channels
        channels = self.heads * self.width // 32
        return mosaic.tiled(((TILE, self.heads, self.width), (TILE // WARPS, 1, channels)), (-6,), (-5, -4))

    @property
    def token(self):  # [heads, width]: a thread has a channel, or neighbouring ones
        heads, channels = self.heads // WARPS, self.heads * self.width // THREADS
        lanes = (-4, -3) if heads > 1 else (-3,)
        return mosaic.tiled(((self.heads, self.width), (heads, self.width), (1, channels)), (-6,), lanes)

    def of_tile(self, ref):
        """A number a token and head."""
        return load(ref, self.tile.reduce(2))

    def of_token(self, ref):
        """A number a head, for all its channels."""
        return self._spread(load(ref, self.token.reduce(1)), self.token, (self.heads, self.width), (0,))

    def channels(self, x):
        return self._spread(x, self.tile, (TILE, self.heads, self.width), (0, 1))

    def _spread(self, x, layout, shape, axes):
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)


@dataclass(frozen=True)
class _Cut:
    """How time is cut: tiles of a row, tiles of a segment."""

    tiles: int
    each: int

    @classmethod
    def of(cls, e, segments):
        tiles = -(-e.shape[1] // TILE)
        return cls(tiles, -(-tiles // min(segments, tiles)))

    @property
    def segments(self) -> int:
        return -(-self.tiles // self.each)


@dataclass(frozen=True)
class _Place:
    """A block's row, segment and heads, and the tiles of that segment."""

    row: Any
    segment: Any
    heads: Any
    first: Any
    count: Any

    @property
    def of_segment(self):
        return self.row, self.segment, self.heads

    def of_tile(self, index):
        return self.row, self.first + index, self.heads


# ------------------------------------------------------------------------------------------------- kernels
def _run(name, body, cut, inputs, outputs, fetched, work, flying, interpret):
    """Runs `body(ref, lay, tiles, place)` for rows, segments and groups of heads; `work` is further shared memory."""
    batch, _, heads, width = inputs['e'].shape
    lay = _Layouts(width)
    block = lambda array: ((lay.heads, *array.shape[3:]), jnp.float32)  # what it takes of a token
    scratch = mosaic.slots(TILE, {name: block(inputs[name]) for name in fetched}, flying)
    barrier = {'arrived': scratch.pop('arrived')}  # behind all memory
    scratch |= {name: plgpu.SMEM((TILE, lay.heads, *shape), jnp.float32) for name, shape in work.items()}

    def with_tiles(ref):
        row, segment = lax.axis_index('batch'), lax.axis_index('segment')
        part = Span(Index(lax.axis_index('heads')) * lay.heads, lay.heads)
        first = Index(segment) * cut.each
        count = cut.tiles if cut.segments == 1 else jnp.minimum(cut.each, cut.tiles - first.value)
        tiles = mosaic.Tiles(ref, TILE, cut.each, row, part, fetched, first=first * TILE)
        body(ref, lay, tiles, _Place(row, segment, part.ds, first.value, count))

    grid = {'batch': batch, 'segment': cut.segments, 'heads': heads // lay.heads}
    return mosaic.launch(f'diagonal_gain_{name}', with_tiles, inputs, outputs, scratch | barrier, grid, interpret)


def _over(tiles, count, process, carry, reverse=False):
    """`process(tile, slot, carry)` of so many tiles; all slots but one are on their way meanwhile.

    Results in one place are read out before the next tile's are written to it.
    """
    at = lambda k: count - 1 - k if reverse else k
    ahead = tiles.slots - 1

    def start(k):
        @pl.when(k < count)
        def _():
            tiles.start(at(k), lax.rem(k, tiles.slots))

    def one(k, carry):
        slot = lax.rem(k, tiles.slots)
        tiles.arrive(slot)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tiles.fence()
        start(k + ahead)
        return process(at(k), slot, carry)

    for k in range(ahead):
        start(jnp.int32(k))
    carry = lax.fori_loop(0, count, one, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def _weigh(ref, lay, slot):
    """w of a tile to its place in shared memory; returns e, 1 / M and w."""
    e = load(ref.e_.at[slot], lay.tile)
    inverse = 1.0 / (jnp.sum(e * e, axis=2) * (1.0 / lay.width) + EPS)
    weight = lay.of_tile(ref.step_.at[slot]) * inverse
    store(ref.weight, weight)
    plgpu.commit_smem()
    return e, inverse, weight


def _maps(ref, lay, slot):
    """e, a and b of the tokens of a tile, [heads, width] each."""
    for t in range(TILE):
        e = load(ref.e_.at[slot, t], lay.token)
        b = jnp.minimum(lay.of_token(ref.step_.at[slot, t]), lay.of_token(ref.weight.at[t]) * (e * e))
        yield t, e, (1.0 - lay.of_token(ref.forget_.at[slot, t])) - b, b


def _forward(cut, e, step, forget, initial, keeps, interpret):
    """The read and the gain after each segment, with `keeps` the one before each tile; and what segments shrink."""
    inputs = {'e': e, 'step': step, 'forget': forget}
    entering, shrink = initial[:, None], None
    if cut.segments > 1:
        carried = _carry(cut, inputs, False, interpret)
        shrink = carried['shrink']
        entering = _entering(shrink, carried['grown'], initial)

    def body(ref, lay, tiles, place):
        def process(index, slot, K):
            if keeps:
                store(ref.gains.at[place.of_tile(index)], K)
            _weigh(ref, lay, slot)
            for t, e, a, b in _maps(ref, lay, slot):
                store(ref.result.at[t], K * e)
                K = a * K + b
            plgpu.commit_smem()
            tiles.send(ref.result, ref.read, index)
            return K

        K = _over(tiles, place.count, process, load(ref.entering.at[place.of_segment], lay.token))
        store(ref.final.at[place.of_segment], K)

    outputs = {'read': _like(e), 'final': _like(entering)}
    if keeps:
        outputs['gains'] = _gains(e, cut.tiles)
    work = {'result': (e.shape[3],), 'weight': ()}
    found = _run('forward', body, cut, inputs | {'entering': entering}, outputs, list(inputs), work, 3, interpret)
    return found, shrink


def _carry(cut, inputs, reverse, interpret):
    """What a segment does to its gain, `shrink K + grown`; with `reverse` to D, of which `shrink` is the same."""

    def body(ref, lay, tiles, place):
        zero = plgpu.layout_cast(jnp.zeros((lay.heads, lay.width), jnp.float32), lay.token)

        def process(index, slot, carry):
            _weigh(ref, lay, slot)
            grown, shrink = carry
            maps = list(_maps(ref, lay, slot))
            for t, e, a, b in maps[::-1] if reverse else maps:
                grown = a * grown + (load(ref.dread_.at[slot, t], lay.token) * e if reverse else b)
                shrink = shrink * a
            return grown, shrink

        grown, shrink = _over(tiles, place.count, process, (zero, zero + 1.0), reverse)
        store(ref.grown.at[place.of_segment], grown)
        if not reverse:
            store(ref.shrink.at[place.of_segment], shrink)

    one = _gains(inputs['e'], cut.segments)
    outputs = {'grown': one} if reverse else {'grown': one, 'shrink': one}
    name = 'cocarry' if reverse else 'carry'
    return _run(name, body, cut, inputs, outputs, list(inputs), {'weight': ()}, 3, interpret)


def _backward(cut, inputs, interpret):
    """The gradients of e, of the steps and of what is forgotten, and D before each segment.

    With `y = D (1 - K)`, D being that of the gain that is written, and n = min(1, e^2 / M): the gradient of g is the
    sum of y n, that of l of D K, and e's `dr K + 2 w e (y' - sum(y' n) / P)`, y' being y where n < 1.
    """

    def body(ref, lay, tiles, place):
        kept = lambda index: load(ref.gains.at[place.of_tile(index)], lay.token)

        def process(index, slot, carry):
            D, K = carry
            before = kept(jnp.maximum(index - 1, 0))  # early: it comes from the device's memory
            e, inverse, weight = _weigh(ref, lay, slot)
            maps = list(_maps(ref, lay, slot))
            for t, _, a, b in maps:
                store(ref.gain.at[t], K)
                K = a * K + b
            for t, e_t, a, _ in maps[::-1]:
                store(ref.due.at[t], D)
                D = a * D + load(ref.dread_.at[slot, t], lay.token) * e_t
            plgpu.commit_smem()
            K, due = load(ref.gain, lay.tile), load(ref.due, lay.tile)
            share = e * e * lay.channels(inverse)
            y = due * (1.0 - K)
            free = jnp.where(share <= 1.0, y, 0.0)
            mean = jnp.sum(free * share, axis=2) * (1.0 / lay.width)
            through = lay.channels(2.0 * weight) * e * (free - lay.channels(mean))
            store(ref.gain, load(ref.dread_.at[slot], lay.tile) * K + through)  # each thread where it has read
            store(ref.steps, jnp.sum(y * jnp.minimum(share, 1.0), axis=2))
            store(ref.forgotten, -jnp.sum(due * K, axis=2))
            plgpu.commit_smem()
            tiles.send(ref.gain, ref.de, index)
            tiles.send(ref.steps, ref.dstep, index)
            tiles.send(ref.forgotten, ref.dforget, index)
            return D, before

        carry = load(ref.leaving.at[place.of_segment], lay.token), kept(place.count - 1)
        D, _ = _over(tiles, place.count, process, carry, reverse=True)
        store(ref.dinitial.at[place.of_segment], D)

    e, width = inputs['e'], inputs['e'].shape[3]
    outputs = {'de': _like(e), 'dstep': _like(inputs['step']), 'dforget': _like(inputs['step'])}
    outputs['dinitial'] = _gains(e, cut.segments)
    work = {'gain': (width,), 'due': (width,), 'weight': (), 'steps': (), 'forgotten': ()}
    fetched = ['e', 'step', 'forget', 'dread']
    return _run('backward', body, cut, inputs, outputs, fetched, work, 2, interpret)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _gains(e, count):
    """So many gains of a row."""
    return jax.ShapeDtypeStruct((e.shape[0], count, *e.shape[2:]), jnp.float32)
