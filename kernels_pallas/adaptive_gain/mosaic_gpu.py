"""The matrix gain on NVIDIA GPUs, token by token: a warp holds the gain of one head in registers (Pallas Mosaic GPU).

With `w = alpha / (|e|^2 + 1e-6)` the law needs no normalised error: `r = K e` is read, then
`K <- l K + w (e - l r) e^T`. Three kernels, each a pass over time with one matrix a head, no atomics, no stored states:

* forward:  K from token to token, writes r.
* backward: D, the gradient of K, from the last token to the first. With `p = D e`: the gradients of w and l, that of
  the read with what it owes to later tokens, `d = dr - l w p`, and the part of e's gradient that needs D.
* replay:   K once more, now with r known, for the part of e's gradient that needs K: `K^T d`.

The gradient of log l is `l <D, K>`, which obeys a recurrence of scalars (`_backward`), so that D and K never meet.
The state is laid out as 4 heads (warps) x P rows x P columns: 8 lanes over rows, 4 over columns, P P / 32 registers.
"""

import functools
import itertools
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

HEADS = 4  # of a block, one a warp
WIDTHS = (16, 32)
FORWARD_TILE, BACKWARD_TILE = 16, 8  # tokens; shared memory for 6 and 5 or more blocks a multiprocessor


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
        return f'it holds heads of {" or ".join(map(str, WIDTHS))} channels, not {width}'
    return None


def variants(width: int) -> tuple[str, ...]:
    """The kernels that a call runs, by the name of their card."""
    return (f'width{width}',)


def matrix(e, alpha, log_decay, reset, initial_gain, interpret=None):
    """`K_k e_k` and the final gain; shapes as in `reference.matrix`, float32, reset may be None, any H and T."""
    if reset is not None:
        # The gain that a first token reads is zero if its predecessor forgets everything and learns nothing.
        ends = jnp.pad(reset[:, 1:], ((0, 0), (0, 1)))[..., None]
        alpha, log_decay = jnp.where(ends, 0, alpha), jnp.where(ends, -jnp.inf, log_decay)
        initial_gain = jnp.where(reset[:, 0, None, None, None], 0, initial_gain)
    batch, length, heads, _ = e.shape
    # A tile of all heads is one run of bytes, which must not lead over the end of its row (mosaic.Copy.runs_on).
    time = -length % FORWARD_TILE if heads <= HEADS and batch > 1 else 0
    pad = lambda x, *widths: jnp.pad(x, [*((0, width) for width in widths), *((0, 0),) * (x.ndim - len(widths))])
    tokens = lambda x: pad(x, 0, time, -heads % HEADS)  # with zeros, which leave the gain as it is
    out, gain = _gain(tokens(e), tokens(alpha), tokens(log_decay), pad(initial_gain, 0, -heads % HEADS), interpret)
    return out[:, :length, :heads], gain[:, :heads]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gain(e, alpha, log_decay, initial_gain, interpret):
    return _gain_forward(e, alpha, log_decay, initial_gain, interpret)[0]


def _gain_forward(e, alpha, log_decay, initial_gain, interpret):
    power = jnp.sum(e * e, -1) + EPS
    forget = -jnp.expm1(log_decay)  # 1 - l, so that tokens beyond the last, filled with zeros, change nothing
    weight = alpha / power
    read, gain = _forward(e, weight, forget, initial_gain, interpret)
    return (read, gain), (e, power, alpha, forget, initial_gain, read, gain)


def _gain_backward(interpret, kept, cotangents):
    e, power, alpha, forget, initial_gain, read, gain = kept
    dread, dgain = cotangents
    weight = alpha / power
    share = jnp.sum(dgain * gain, (-1, -2))
    owed, de, dweight, dlog_decay, dinitial = _backward(e, weight, forget, read, dread, dgain, share, interpret)
    through_weight = -2 * weight / power * dweight
    initial = jnp.swapaxes(initial_gain, -1, -2)
    de = _replay(e, weight, forget, read, owed, de, through_weight, initial, interpret)
    return de, dweight / power, dlog_decay, dinitial


_gain.defvjp(_gain_forward, _gain_backward)


# ------------------------------------------------------------------------------------------------- kernels
@dataclass(frozen=True)
class _Tiles:
    """Layouts of one kernel's arrays, and loads, stores and broadcasts between them."""

    width: int
    tile: int

    @property
    def state(self):  # [heads, rows, columns]
        return mosaic.tiled(((HEADS, self.width, self.width), (1, 8, self.width // 4)), (-6,), (-4, -2))

    @property
    def flat(self):  # [tile, heads, channels]: a lane takes one channel, of one token or of every second
        tokens = 32 // self.width
        lanes = (-4, -3) if tokens > 1 else (-4,)
        return mosaic.tiled(((self.tile, HEADS, self.width), (tokens, 1, 1)), (-5,), lanes)

    def by_row(self, ref):
        return load(ref, self.state.reduce(2))

    def by_column(self, ref):
        return load(ref, self.state.reduce(1))

    def by_head(self, ref):
        return load(ref, self.state.reduce((1, 2)))

    def rows(self, x):
        return self._spread(x, (0, 1), self.state, 3)

    def columns(self, x):
        return self._spread(x, (0, 2), self.state, 3)

    def heads(self, x):
        return self._spread(x, (0,), self.state, 3)

    def head_rows(self, x):
        return self._spread(x, (0,), self.state.reduce(2), 2)

    def head_columns(self, x):
        return self._spread(x, (0,), self.state.reduce(1), 2)

    def _spread(self, x, axes, layout, rank):
        shape = (HEADS, self.width, self.width)[:rank]
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)


def _launch(body, name, e, tile, loaded, out_type, scratch, interpret):
    """`plgpu.kernel` over rows and groups of heads; `loaded` says of each input by tiles whether it has channels.

    Scratch: two slots of every input tile, then `scratch`, then the barriers of the slots.
    """
    batch, _, heads, width = e.shape
    shared = lambda channels, *slots: plgpu.SMEM(
        (*slots, tile, HEADS, width) if channels else (*slots, tile, HEADS), jnp.float32
    )
    return mosaic.kernel(
        f'adaptive_gain_{name}',
        body,
        out_type,
        [
            *(shared(channels, 2) for channels in loaded),
            *(shared(channels, *slots) for channels, *slots in scratch),
            plgpu.Barrier(num_arrivals=len(loaded), num_barriers=2),
        ],
        {'batch': batch, 'heads': heads // HEADS},
        interpret,
    )


def _block():
    return lax.axis_index('batch'), _heads().ds


def _heads():
    return Span(Index(lax.axis_index('heads')) * HEADS, HEADS)


def _box(array, tile, index):
    """The block's part of an array [B, T, H, ...] in a tile of time."""
    times = Span(Index(index) * tile, tile)
    return lax.axis_index('batch'), times, _heads(), *(slice(None) for _ in array.shape[3:])


def _over_tiles(inputs, slots, barrier, length, tile, process, carry, reverse=False):
    """Folds `process(tile, slot, carry)` over the tiles of time, the next one on its way meanwhile."""
    tiles = -(-length // tile)
    place = lambda k: (tiles - 1 - k) if reverse else k

    def fetch(k):
        copies = [(source, _box(source, tile, place(k)), target) for source, target in zip(inputs, slots, strict=True)]
        mosaic.fetch(copies, lax.rem(k, 2), barrier)

    fetch(
        lax.axis_index('batch') * 0
    )  # traced: a slice of known bounds may not leave the array, and the last tile does

    def body(k, carry):
        slot = lax.rem(k, 2)
        plgpu.barrier_wait(barrier.at[slot])
        # The outputs' buffers are read out, and every warp is past the slot that the next tile takes.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()

        @pl.when(k + 1 < tiles)
        def _():
            fetch(k + 1)

        return process(place(k), slot, carry)

    carry = lax.fori_loop(0, tiles, body, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def _write(buffers, outputs, index, tile, slots=()):
    """Begins to write a tile of results; `slots` of the first buffers, which have some."""
    plgpu.commit_smem()
    for buffer, output, slot in itertools.zip_longest(buffers, outputs, slots):
        mosaic.send(buffer, output, _box(output, tile, index), slot)


def _forward(e, weight, forget, initial_gain, interpret):
    """r [B, T, H, P] and the final gain."""
    tiles = _Tiles(e.shape[3], FORWARD_TILE)

    def body(e, weight, forget, initial, read, final, es, ws, fs, rs, barrier):
        batch, heads = _block()

        def step(slot, t, K):
            column = tiles.columns(tiles.by_column(es.at[slot, t]))
            keep = 1.0 - tiles.by_head(fs.at[slot, t])
            r = jnp.sum(K * column, axis=2)
            store(rs.at[t], r)
            error = tiles.by_row(es.at[slot, t]) - tiles.head_rows(keep) * r
            learn = tiles.head_rows(tiles.by_head(ws.at[slot, t])) * error
            return tiles.heads(keep) * K + tiles.rows(learn) * column

        def process(index, slot, K):
            K = lax.fori_loop(0, tiles.tile, functools.partial(step, slot), K)
            _write([rs], [read], index, tiles.tile)
            return K

        K = load(initial.at[batch, heads], tiles.state)
        K = _over_tiles([e, weight, forget], [es, ws, fs], barrier, e.shape[1], tiles.tile, process, K)
        store(final.at[batch, heads], K)

    out_type = (_like(e), _like(initial_gain))
    loaded, scratch = [True, False, False], [(True,)]
    return _launch(body, 'forward', e, tiles.tile, loaded, out_type, scratch, interpret)(
        e, weight, forget, initial_gain
    )


def _backward(e, weight, forget, read, dread, dgain, share, interpret):
    """d and the gradients: e's by D, w's, log l's, the initial gain's; share [B, H] is `<D, K>` after the last token.

    `<D_t, K_t>`, D_t being the gradient of the gain that token t reads, is what token t leaves of `<D_t+1, K_t+1>`:
    without what it learnt, `w (e - l r)^T D_t+1 e`, it is `l <D_t+1, K_t>`, the gradient of log l but for l's part in
    the learning; with what it read, `d^T r`, it is `<D_t, K_t>`. Where l = 0 all of it ends.
    """
    tiles = _Tiles(e.shape[3], BACKWARD_TILE)

    def body(
        e, weight, forget, read, dread, dgain, share, owed, de, dweight, dlog, dinitial,
        es, ws, fs, rs, gs, by_column, by_row, dws, dls, barrier,
    ):  # fmt: skip
        batch, heads = _block()

        def step(slot, i, carry):
            t = tiles.tile - 1 - i
            D, share = carry
            column, row = tiles.columns(tiles.by_column(es.at[slot, t])), tiles.by_row(es.at[slot, t])
            weight, keep = tiles.by_head(ws.at[slot, t]), 1.0 - tiles.by_head(fs.at[slot, t])
            r, weights = tiles.by_row(rs.at[slot, t]), tiles.head_rows(weight)
            p = jnp.sum(D * column, axis=2)
            error = row - tiles.head_rows(keep) * r
            d = tiles.by_row(gs.at[slot, t]) - tiles.head_rows(keep * weight) * p
            dw = jnp.sum(error * p, axis=1)
            left = jnp.where(keep > 0.0, share - weight * dw, 0.0)
            store(by_column.at[t], jnp.sum(D * tiles.rows(weights * error), axis=1))
            store(by_row.at[t], weights * p)
            store(gs.at[slot, t], d)
            store(dws.at[t], dw)
            store(dls.at[t], left - keep * weight * jnp.sum(r * p, axis=1))
            return tiles.heads(keep) * D + tiles.rows(d) * column, left + jnp.sum(d * r, axis=1)

        def process(index, slot, carry):
            carry = lax.fori_loop(0, tiles.tile, functools.partial(step, slot), carry)
            plgpu.commit_smem()
            store(by_column, load(by_column, tiles.flat) + load(by_row, tiles.flat))
            _write([gs, by_column, dws, dls], [owed, de, dweight, dlog], index, tiles.tile, [slot])
            return carry

        carry = load(dgain.at[batch, heads], tiles.state), tiles.by_head(share.at[batch, heads])
        inputs, slots = [e, weight, forget, read, dread], [es, ws, fs, rs, gs]
        D, _ = _over_tiles(inputs, slots, barrier, e.shape[1], tiles.tile, process, carry, reverse=True)
        store(dinitial.at[batch, heads], D)

    out_type = (_like(e), _like(e), _like(weight), _like(weight), _like(dgain))
    loaded, scratch = [True, False, False, True, True], [(True,), (True,), (False,), (False,)]
    return _launch(body, 'backward', e, tiles.tile, loaded, out_type, scratch, interpret)(
        e, weight, forget, read, dread, dgain, share
    )


def _replay(e, weight, forget, read, owed, de, through_weight, initial_transposed, interpret):
    """e's gradient: `de + K^T d + through_weight e`, K being replayed transposed."""
    tiles = _Tiles(e.shape[3], BACKWARD_TILE)

    def body(e, weight, forget, through, read, owed, de, initial, out, es, ws, fs, ts, rs, ds, des, outs, barrier):
        batch, heads = _block()

        def step(slot, t, K):
            column, row = tiles.by_column(es.at[slot, t]), tiles.by_row(es.at[slot, t])
            keep = 1.0 - tiles.by_head(fs.at[slot, t])
            back = jnp.sum(K * tiles.columns(tiles.by_column(ds.at[slot, t])), axis=2)
            through = tiles.head_rows(tiles.by_head(ts.at[slot, t])) * row
            store(outs.at[t], tiles.by_row(des.at[slot, t]) + back + through)
            error = column - tiles.head_columns(keep) * tiles.by_column(rs.at[slot, t])
            learn = tiles.head_columns(tiles.by_head(ws.at[slot, t])) * error
            return tiles.heads(keep) * K + tiles.rows(row) * tiles.columns(learn)

        def process(index, slot, K):
            K = lax.fori_loop(0, tiles.tile, functools.partial(step, slot), K)
            _write([outs], [out], index, tiles.tile)
            return K

        K = load(initial.at[batch, heads], tiles.state)
        inputs, slots = [e, weight, forget, through, read, owed, de], [es, ws, fs, ts, rs, ds, des]
        _over_tiles(inputs, slots, barrier, e.shape[1], tiles.tile, process, K)

    loaded, scratch = [True, False, False, False, True, True, True], [(True,)]
    return _launch(body, 'replay', e, tiles.tile, loaded, _like(e), scratch, interpret)(
        e, weight, forget, through_weight, read, owed, de, initial_transposed
    )


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)
