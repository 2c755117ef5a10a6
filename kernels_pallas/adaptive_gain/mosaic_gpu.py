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
class _Layouts:
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


def _run(name, body, inputs, outputs, fetched, staged, tile, interpret):
    """Runs `body(refs, tiles)` for rows and groups of heads; `staged` are results that wait for their way out."""
    batch, length, heads, _ = inputs['e'].shape
    block = lambda array: ((HEADS, *array.shape[3:]), jnp.float32)  # what it takes of a token
    scratch = mosaic.slots(tile, {name: block(inputs[name]) for name in fetched})
    results = {f'{name}_': plgpu.SMEM((tile, HEADS, *shape), jnp.float32) for name, shape in staged.items()}
    barrier = {'arrived': scratch.pop('arrived')}  # behind all memory

    def with_tiles(ref):
        row, part = lax.axis_index('batch'), Span(Index(lax.axis_index('heads')) * HEADS, HEADS)
        body(ref, mosaic.Tiles(ref, tile, -(-length // tile), row, part, fetched))

    grid = {'batch': batch, 'heads': heads // HEADS}
    found = mosaic.launch(
        f'adaptive_gain_{name}', with_tiles, inputs, outputs, scratch | results | barrier, grid, interpret
    )
    return found.values()


def _block():
    return lax.axis_index('batch'), Span(Index(lax.axis_index('heads')) * HEADS, HEADS).ds


def _over(tiles, process, carry, reverse=False):
    """`Tiles.fold` with results in one place: they are read out before the next tile's are written to it."""
    place = lambda k: tiles.count - 1 - k if reverse else k

    def one(k, carry):
        slot = lax.rem(k, tiles.slots)
        tiles.arrive(slot)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tiles.fence()

        @pl.when(k + 1 < tiles.count)
        def _():
            tiles.start(place(k + 1), lax.rem(k + 1, tiles.slots))

        return process(place(k), slot, carry)

    tiles.begin(reverse)
    carry = lax.fori_loop(0, tiles.count, one, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def _write(tiles, ref, index, results):
    """Begins to write a tile of results, `{output: (place, slot)}`."""
    plgpu.commit_smem()
    for output, (place, slot) in results.items():
        tiles.send(place, getattr(ref, output), index, slot)


def _forward(e, weight, forget, initial_gain, interpret):
    """r [B, T, H, P] and the final gain."""
    lay = _Layouts(e.shape[3], FORWARD_TILE)

    def body(ref, tiles):
        batch, heads = _block()

        def step(slot, t, K):
            column = lay.columns(lay.by_column(ref.e_.at[slot, t]))
            keep = 1.0 - lay.by_head(ref.forget_.at[slot, t])
            r = jnp.sum(K * column, axis=2)
            store(ref.read_.at[t], r)
            error = lay.by_row(ref.e_.at[slot, t]) - lay.head_rows(keep) * r
            learn = lay.head_rows(lay.by_head(ref.weight_.at[slot, t])) * error
            return lay.heads(keep) * K + lay.rows(learn) * column

        def process(index, slot, K):
            K = lax.fori_loop(0, tiles.size, functools.partial(step, slot), K)
            _write(tiles, ref, index, {'read': (ref.read_, None)})
            return K

        K = load(ref.initial.at[batch, heads], lay.state)
        store(ref.final.at[batch, heads], _over(tiles, process, K))

    inputs = {'e': e, 'weight': weight, 'forget': forget, 'initial': initial_gain}
    outputs = {'read': _like(e), 'final': _like(initial_gain)}
    staged = {'read': (lay.width,)}
    return _run('forward', body, inputs, outputs, ['e', 'weight', 'forget'], staged, lay.tile, interpret)


def _backward(e, weight, forget, read, dread, dgain, share, interpret):
    """d and the gradients: e's by D, w's, log l's, the initial gain's; share [B, H] is `<D, K>` after the last token.

    `<D_t, K_t>`, D_t being the gradient of the gain that token t reads, is what token t leaves of `<D_t+1, K_t+1>`:
    without what it learnt, `w (e - l r)^T D_t+1 e`, it is `l <D_t+1, K_t>`, the gradient of log l but for l's part in
    the learning; with what it read, `d^T r`, it is `<D_t, K_t>`. Where l = 0 all of it ends.
    """
    lay = _Layouts(e.shape[3], BACKWARD_TILE)

    def body(ref, tiles):
        batch, heads = _block()
        owed_ = ref.dread_  # d takes its place

        def step(slot, i, carry):
            t = tiles.size - 1 - i
            D, share = carry
            column, row = lay.columns(lay.by_column(ref.e_.at[slot, t])), lay.by_row(ref.e_.at[slot, t])
            weight, keep = lay.by_head(ref.weight_.at[slot, t]), 1.0 - lay.by_head(ref.forget_.at[slot, t])
            r, weights = lay.by_row(ref.read_.at[slot, t]), lay.head_rows(weight)
            p = jnp.sum(D * column, axis=2)
            error = row - lay.head_rows(keep) * r
            d = lay.by_row(ref.dread_.at[slot, t]) - lay.head_rows(keep * weight) * p
            dw = jnp.sum(error * p, axis=1)
            left = jnp.where(keep > 0.0, share - weight * dw, 0.0)
            store(ref.de_.at[t], jnp.sum(D * lay.rows(weights * error), axis=1))
            store(ref.by_row_.at[t], weights * p)
            store(owed_.at[slot, t], d)
            store(ref.dweight_.at[t], dw)
            store(ref.dlog_.at[t], left - keep * weight * jnp.sum(r * p, axis=1))
            return lay.heads(keep) * D + lay.rows(d) * column, left + jnp.sum(d * r, axis=1)

        def process(index, slot, carry):
            carry = lax.fori_loop(0, tiles.size, functools.partial(step, slot), carry)
            plgpu.commit_smem()
            store(ref.de_, load(ref.de_, lay.flat) + load(ref.by_row_, lay.flat))
            results = {'owed': (owed_, slot), 'de': (ref.de_, None)}
            _write(tiles, ref, index, results | {'dweight': (ref.dweight_, None), 'dlog': (ref.dlog_, None)})
            return carry

        carry = load(ref.dgain.at[batch, heads], lay.state), lay.by_head(ref.share.at[batch, heads])
        D, _ = _over(tiles, process, carry, reverse=True)
        store(ref.dinitial.at[batch, heads], D)

    inputs = {'e': e, 'weight': weight, 'forget': forget, 'read': read, 'dread': dread, 'dgain': dgain, 'share': share}
    outputs = {'owed': _like(e), 'de': _like(e), 'dweight': _like(weight), 'dlog': _like(weight)}
    outputs['dinitial'] = _like(dgain)
    staged = {'de': (lay.width,), 'by_row': (lay.width,), 'dweight': (), 'dlog': ()}
    fetched = ['e', 'weight', 'forget', 'read', 'dread']
    return _run('backward', body, inputs, outputs, fetched, staged, lay.tile, interpret)


def _replay(e, weight, forget, read, owed, de, through_weight, initial_transposed, interpret):
    """e's gradient: `de + K^T d + through_weight e`, K being replayed transposed."""
    lay = _Layouts(e.shape[3], BACKWARD_TILE)

    def body(ref, tiles):
        batch, heads = _block()

        def step(slot, t, K):
            column, row = lay.by_column(ref.e_.at[slot, t]), lay.by_row(ref.e_.at[slot, t])
            keep = 1.0 - lay.by_head(ref.forget_.at[slot, t])
            back = jnp.sum(K * lay.columns(lay.by_column(ref.owed_.at[slot, t])), axis=2)
            through = lay.head_rows(lay.by_head(ref.through_.at[slot, t])) * row
            store(ref.out_.at[t], lay.by_row(ref.de_.at[slot, t]) + back + through)
            error = column - lay.head_columns(keep) * lay.by_column(ref.read_.at[slot, t])
            learn = lay.head_columns(lay.by_head(ref.weight_.at[slot, t])) * error
            return lay.heads(keep) * K + lay.rows(row) * lay.columns(learn)

        def process(index, slot, K):
            K = lax.fori_loop(0, tiles.size, functools.partial(step, slot), K)
            _write(tiles, ref, index, {'out': (ref.out_, None)})
            return K

        _over(tiles, process, load(ref.initial.at[batch, heads], lay.state))

    inputs = {'e': e, 'weight': weight, 'forget': forget, 'through': through_weight, 'read': read, 'owed': owed}
    inputs |= {'de': de, 'initial': initial_transposed}
    fetched = ['e', 'weight', 'forget', 'through', 'read', 'owed', 'de']
    (out,) = _run('replay', body, inputs, {'out': _like(e)}, fetched, {'out': (lay.width,)}, lay.tile, interpret)
    return out


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)
