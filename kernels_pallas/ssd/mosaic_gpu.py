"""`ssd` with one decay a head and step, for Hopper GPUs, in Pallas Mosaic: bfloat16 products, summed in float32.

Chunks of 64 tokens; a head's values are taken 64 at a time, of which every kernel has one such slice in hand ("unit").

* `chain`: a block goes through the chunks of a row and unit with the state in registers, `S' = kept S + (left x)^T B`,
  and reads it, `y = (scores decays) x + seen (C S)`. The gradient's own chain is the same from the other end, with dy
  for x and C for B. Of each, the state that enters a chunk is kept in bfloat16, as products take it.
* `gradients`: a block has a chunk of a row and group, and goes through the group's units: so dB and dC are summed in
  registers, each by one owner, no atomics. Of its warpgroups one has queries for rows, for dC; one has keys, for dB and
  dx, which is the same with time turned round; one fetches ahead by the copy engine.

Decays are powers of two of differences of sums from the chunk's start. A document's first token forgets all there is by
a decay of `2^-FORGET`, which is 0 in float32, and no decay is less: so sums stay below 2^14, their rounding below 2^-11.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import core as mosaic_core
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic, platform
from kernels_pallas.mosaic import Index, Span

CHUNK = 64  # tokens
PART = 64  # values of a unit
KEYS = (64, 128)
SLOTS = 2  # chunks, or units of a chunk, in flight
FORGET = 160.0
HOPPER = 9  # major compute capability
MOST = 2**31  # what indices of 32 bits can count
LOG2E = math.log2(math.e)
COMPUTE_REGISTERS, FETCH_REGISTERS = 240, 24
QUERIES, BY_KEYS, FETCHES = range(3)  # warpgroups of `gradients`

WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


# ----------------------------------------------------------------------------------------------------------- the call
def unsupported(x: Any, log_decay: Any, B: Any, C: Any, exclusive: bool) -> str | None:
    """Why this cannot take a call on the device that is here, or None: of arrays, or of their shapes."""
    for name, value in (('x', x), ('B', B), ('C', C)):
        if value.dtype != jnp.bfloat16:
            return f'it takes bfloat16, {name} is {value.dtype.name}'
    if log_decay.ndim != 3:
        return 'it takes one decay a head and step, not one a key dimension'
    if exclusive:
        return 'its tokens read the state after them, not the one before'
    (batch, length, heads, width), (groups, keys) = x.shape, B.shape[2:]
    if keys not in KEYS or not width or width % PART:
        return f'it takes {KEYS[0]} or {KEYS[1]} keys and a multiple of {PART} values a head, not {keys} and {width}'
    if length < CHUNK:
        return f'it takes rows of at least {CHUNK} tokens, not {length}'
    padded = length + -length % CHUNK
    if batch * max(padded * max(heads, groups), padded // CHUNK * heads * width) >= MOST:
        return f'indices of 32 bits cannot count the tokens and heads of x, {x.shape}'
    capability = platform.compute_capability()
    if capability is None:
        return 'it needs an NVIDIA GPU'
    if capability[0] != HOPPER:
        return f'it is for GPUs of compute capability {HOPPER}.x, this one has {capability[0]}.{capability[1]}'
    return None


def variants(keys: int) -> tuple[str, ...]:
    """The programs that a call runs, by the names of their cards."""
    return (f'keys{keys}',)


def ssd(x, log_decay, B, C, step, reset, initial_state, interpret=None):
    """Output and final state of `api.ssd`; shapes as there.

    Args:
      x: [B, T, H, P], bfloat16, P a multiple of `PART`.
      log_decay: float32 [B, T, H].
      B, C: [B, T, G, N], bfloat16, N of `KEYS`.
      step: float32 [B, T, H]; None for 1.
      reset: bool [B, T] or None.
      initial_state: float32 [B, H, P, N].
      interpret: parameters of Mosaic's interpreter, to run on a CPU; None compiles.
    """
    length = x.shape[1]
    decay = jnp.maximum(log_decay * LOG2E, -FORGET)
    if reset is not None:
        decay = jnp.where(reset[..., None], -FORGET, decay)
    step = jnp.ones_like(decay) if step is None else step
    behind = -length % CHUNK  # tokens that neither decay nor add anything
    pad = lambda value: jnp.pad(value, ((0, 0), (0, behind)) + ((0, 0),) * (value.ndim - 2)) if behind else value
    y, final = _padded(*map(pad, (x, decay, B, C, step)), initial_state, interpret)
    return y[:, :length], final


@dataclass(frozen=True)
class _Call:
    """Sizes of a call, and where its blocks find what."""

    batch: int
    length: int
    heads: int
    width: int
    groups: int
    keys: int
    interpret: Any

    @property
    def chunks(self) -> int:
        return self.length // CHUNK

    @property
    def units(self) -> int:
        return self.heads * self.width // PART

    def head(self, unit: Any) -> Any:
        return lax.div(unit, self.width // PART)

    def tokens(self, row: Any, chunk: Any) -> Span:
        return Span(Index(row) * self.length + Index(chunk) * CHUNK, CHUNK)

    def values(self, row: Any, chunk: Any, unit: Any) -> mosaic.Box:
        return self.tokens(row, chunk), Span(Index(unit) * PART, PART)

    def by_group(self, row: Any, chunk: Any, group: Any) -> mosaic.Box:
        return self.tokens(row, chunk), Span(Index(group) * self.keys, self.keys)

    def vector(self, row: Any, chunk: Any, head: Any, heads: int) -> mosaic.Box:
        return (Span((Index(row) * heads + Index(head)) * self.length + Index(chunk) * CHUNK, CHUNK),)

    def state(self, row: Any, chunk: Any, unit: Any) -> mosaic.Box:
        return Span(((Index(row) * self.chunks + Index(chunk)) * self.units + Index(unit)) * PART, PART), slice(None)


def _call(x: jax.Array, B: jax.Array, interpret: Any) -> _Call:
    return _Call(*x.shape, *B.shape[2:], interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _padded(x, decay, B, C, step, initial, interpret):
    """`ssd` of whole chunks, of decays to the base of two, of which none forgets more than `FORGET`."""
    y, final, _ = _forward_chain(x, decay, B, C, step, initial, interpret, keep=False)
    return y, final


def _forward(x, decay, B, C, step, initial, interpret):
    y, final, states = _forward_chain(x, decay, B, C, step, initial, interpret, keep=True)
    return (y, final), (x, decay, B, C, step, states)


def _forward_chain(x, decay, B, C, step, initial, interpret, keep):
    call = _call(x, B, interpret)
    arrays = {'values': _flat(x), 'keys': _flat(B), 'queries': _flat(C), 'sums': _sums(decay), 'step': _by_head(step)}
    y, final, states = chain(call, arrays, initial.reshape(-1, call.keys), keep)
    return y.reshape(x.shape), final.reshape(initial.shape), states


def _backward(interpret, residuals, cotangents):
    x, decay, B, C, step, states = residuals
    dy, dfinal = cotangents
    call = _call(x, B, interpret)
    arrays = {'queries': _flat(C), 'keys': _flat(B), 'dy': _flat(dy), 'x': _flat(x), 'entering': states}
    arrays |= {'sums': _sums(decay), 'step': _by_head(step)}
    turned = {'values': arrays['dy'], 'keys': arrays['queries'], 'sums': arrays['sums']}
    _, dinitial, arrays['leaving'] = chain(call, turned, dfinal.reshape(-1, call.keys), keep=True)
    found = gradients(call, arrays)
    # A head's sums over its slices of values, [B, H, chunks, CHUNK].
    split = lambda value: value.reshape(call.batch, call.heads, -1, call.chunks, CHUNK).sum(2)
    later, across, strict, added, dstep = (split(found[name]) for name in VECTORS)
    by_chunk = lambda value: value.reshape(call.batch, call.heads, call.chunks, CHUNK)
    sums, steps = by_chunk(arrays['sums']), by_chunk(arrays['step'])
    # A token's decay is in all pairs of one before it, or the state that enters, and one not before it, or the state
    # that leaves.
    ahead = jnp.flip(jnp.cumsum(jnp.flip(later - steps * strict, -1), -1), -1)
    passed = jnp.cumsum(steps * added, -1) - steps * added
    whole = jnp.exp2(sums[..., -1:]) * across.sum(-1, keepdims=True)
    to_tokens = lambda value: jnp.moveaxis(value.reshape(call.batch, call.heads, -1), 1, 2)
    return (
        found['dx'].reshape(x.shape),
        to_tokens((ahead + passed + whole) / LOG2E),
        found['dkeys'].reshape(B.shape),
        found['dqueries'].reshape(C.shape),
        to_tokens(dstep),
        dinitial.reshape(call.batch, call.heads, call.width, call.keys),
    )


_padded.defvjp(_forward, _backward)


def _flat(value: jax.Array) -> jax.Array:
    return value.reshape(value.shape[0] * value.shape[1], -1)


def _by_head(value: jax.Array) -> jax.Array:
    """[B, T, H] as flat [B, H, T]."""
    return jnp.moveaxis(value, 2, 1).reshape(-1)


def _sums(decay: jax.Array) -> jax.Array:
    """Sums from the chunk's start, each token's own decay included, flat [B, H, T]."""
    return jnp.cumsum(_by_head(decay).reshape(-1, CHUNK), 1).reshape(-1)


# ------------------------------------------------------------------------------------------------------------- kernels
def chain(call: _Call, arrays: Mapping[str, jax.Array], initial: jax.Array, keep: bool) -> Any:
    """The state through the chunks of a row: from the first, or from the last where nothing reads it.

    Args:
      call: sizes.
      arrays: `values` [B*T, H*P], `keys` and, if outputs are asked for, `queries` [B*T, G*N]; `sums` and, with
        queries, `step` [B*H*T].
      initial: float32 [B*H*P, N].
      keep: whether the states that enter the chunks are wanted.

    Returns:
      `(outputs or None, final state, entering states [B*chunks*H*P, N] or None)`.
    """
    reads = 'queries' in arrays
    order = (lambda turn: turn) if reads else (lambda turn: call.chunks - 1 - turn)

    def body(ref):
        row, unit = lax.axis_index('rows'), lax.axis_index('units')
        head = call.head(unit)
        group = lax.div(head, call.heads // call.groups)
        whole = pl.ds((row * call.units + unit) * PART, PART)

        def fetch(turn, slot):
            chunk = order(turn)
            boxes = {'values': call.values(row, chunk, unit)}
            boxes |= dict.fromkeys(('keys', 'queries'), call.by_group(row, chunk, group))
            boxes |= dict.fromkeys(('sums', 'step'), call.vector(row, chunk, head, call.heads))
            mosaic.fetch([(getattr(ref, n), boxes[n], getattr(ref, f'{n}_')) for n in arrays], slot, ref.arrived)

        def one(turn, state):
            slot, chunk = lax.rem(turn, SLOTS), order(turn)
            plgpu.barrier_wait(ref.arrived.at[slot])
            # Results have left their places, and all threads have done with the last chunk.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(turn + 1 < call.chunks)
            def _():
                fetch(turn + 1, 1 - slot)

            ref.state_[...] = state.astype(jnp.bfloat16)
            plgpu.commit_smem()
            if keep:
                mosaic.send(ref.state_, ref.states, call.state(row, chunk, unit))
            sums, total = mosaic.load(ref.sums_.at[slot], BY_ROW), ref.sums_[slot, CHUNK - 1]
            if reads:
                y = _read(ref, slot, sums).astype(jnp.bfloat16)
                weight = jnp.exp2(total - sums) * mosaic.load(ref.step_.at[slot], BY_ROW)
            else:
                weight = jnp.exp2(sums)
            ref.scaled_[...] = (_values(ref.values_.at[slot]) * _spread(weight, 0, PART)).astype(jnp.bfloat16)
            plgpu.commit_smem()

            def added(sum_):
                plgpu.wgmma(sum_, ref.scaled_.T, ref.keys_.at[slot])
                return plgpu.wgmma_accumulator_load(sum_)

            state = state * jnp.exp2(total) + pl.run_scoped(added, plgpu.ACC((PART, call.keys), jnp.float32))
            if reads:
                plgpu.commit_smem()  # all of the warpgroup have read the place that outputs take
                ref.scaled_[...] = y
                plgpu.commit_smem()
                mosaic.send(ref.scaled_, ref.y, call.values(row, chunk, unit))
            return state

        fetch(row * 0, 0)
        state = lax.fori_loop(0, call.chunks, one, mosaic.load(ref.initial.at[whole], WGMMA))
        mosaic.store(ref.final.at[whole], state)
        plgpu.wait_smem_to_gmem(0)

    outputs = {'final': jax.ShapeDtypeStruct(initial.shape, jnp.float32)}
    if reads:
        outputs['y'] = jax.ShapeDtypeStruct(arrays['values'].shape, jnp.bfloat16)
    if keep:
        outputs['states'] = _states(call)
    scratch = {'state_': _matrix(PART, call.keys), 'scaled_': _matrix(CHUNK, PART)}
    scratch |= {'values_': _matrix(SLOTS, CHUNK, PART)}
    scratch |= {f'{name}_': _matrix(SLOTS, CHUNK, call.keys) for name in ('keys', 'queries') if name in arrays}
    scratch |= {f'{name}_': plgpu.SMEM((SLOTS, CHUNK), jnp.float32) for name in ('sums', 'step') if name in arrays}
    scratch |= {'arrived': plgpu.Barrier(num_arrivals=len(arrays), num_barriers=SLOTS)}
    grid = {'rows': call.batch, 'units': call.units}
    name = 'ssd_forward' if reads else 'ssd_turned'
    found = _launch(name, call, body, {**arrays, 'initial': initial}, outputs, scratch, grid)
    return found.get('y'), found['final'], found.get('states')


def _read(ref: Any, slot: Any, sums: Any) -> Any:
    """A chunk's outputs [CHUNK, PART], of the state that enters it and of its own tokens."""

    def products(scores, read):
        plgpu.wgmma(scores, ref.queries_.at[slot], ref.keys_.at[slot].T)
        plgpu.wgmma(read, ref.queries_.at[slot], ref.state_.T)
        weights = _decays(sums, mosaic.load(ref.sums_.at[slot], BY_COLUMN))
        weights = weights * _spread(mosaic.load(ref.step_.at[slot], BY_COLUMN), 1, CHUNK)
        weights = weights * plgpu.wgmma_accumulator_load(scores, wait_n=1)
        seen = plgpu.wgmma_accumulator_load(read) * _spread(jnp.exp2(sums), 0, PART)
        return weights.astype(jnp.bfloat16), seen

    weights, seen = pl.run_scoped(products, *(plgpu.ACC((CHUNK, CHUNK), jnp.float32),) * 2)

    def within(y):
        _multiply(ref, 0, y, weights, ref.values_.at[slot])
        return plgpu.wgmma_accumulator_load(y)

    return seen + pl.run_scoped(within, plgpu.ACC((CHUNK, PART), jnp.float32))


VECTORS = ('later', 'across', 'strict', 'added', 'dstep')


def gradients(call: _Call, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What a chunk's tokens get, of the states that enter it from either end.

    Args:
      call: sizes.
      arrays: `x`, `dy` [B*T, H*P], `keys`, `queries` [B*T, G*N]; `entering`, `leaving`: the states that enter a chunk and
        the gradients of those that leave it, as `chain` gives them; `sums`, `step` [B*H*T].

    Returns:
      `dx`, `dkeys`, `dqueries`, and of each unit, flat [B, units, T] in float32 (`D` are the weights' gradients times
      the weights): `later`, D summed over the tokens before each and the entering state; `strict`, over those after it,
      without its own step; `added`, of the leaving state, and `dstep`, likewise; `across`, whose sum over a chunk is
      the product of both states.
    """
    in_group = call.units // call.groups

    def body(ref):
        row, chunk, group = (lax.axis_index(name) for name in ('rows', 'chunks', 'groups'))
        first = group * in_group

        def produce():
            keys = call.by_group(row, chunk, group)
            mosaic.fetch([(ref.queries, keys, ref.queries_), (ref.keys, keys, ref.keys_)], 0, ref.own)

            def fetch(n, slot):
                unit = first + n
                boxes = dict.fromkeys(('x', 'dy'), call.values(row, chunk, unit))
                boxes |= dict.fromkeys(('entering', 'leaving'), call.state(row, chunk, unit))
                boxes |= dict.fromkeys(('sums', 'step'), call.vector(row, chunk, call.head(unit), call.heads))
                mosaic.fetch([(getattr(ref, n), box, getattr(ref, f'{n}_')) for n, box in boxes.items()], slot, ref.arrived)

            def one(n, _):
                @pl.when(n >= SLOTS)
                def _():
                    plgpu.barrier_wait(ref.used.at[lax.rem(n, SLOTS)])

                fetch(n, lax.rem(n, SLOTS))

            lax.fori_loop(0, in_group, one, None)

        def compute(side):
            """Rows are queries, or keys: tokens by themselves, `own`, and by the others of their chunk."""
            own, other = (ref.queries_, ref.keys_)[:: 1 - 2 * side]
            plgpu.barrier_wait(ref.own.at[0])
            own, other = own.at[0], other.at[0]

            def scored(scores):
                plgpu.wgmma(scores, own, other.T)
                return plgpu.wgmma_accumulator_load(scores)

            def turn(n, scores, sum_):
                slot, unit = lax.rem(n, SLOTS), first + n
                plgpu.barrier_wait(ref.arrived.at[slot])
                values, others = (ref.dy_, ref.x_)[:: 1 - 2 * side]
                state = (ref.entering_, ref.leaving_)[side].at[slot]
                sums = mosaic.load(ref.sums_.at[slot], BY_ROW)
                (place,) = call.vector(row, chunk, unit, call.units)
                give = lambda name, value: mosaic.store(getattr(ref, name).at[place.ds], value)

                def products(pairs, read):
                    plgpu.wgmma(pairs, values.at[slot], others.at[slot].T)
                    plgpu.wgmma(read, own, state.T)
                    decays = _decays(sums, mosaic.load(ref.sums_.at[slot], BY_COLUMN), turned=side == BY_KEYS)
                    if side == QUERIES:
                        decays = decays * _spread(mosaic.load(ref.step_.at[slot], BY_COLUMN), 1, CHUNK)
                    pairs = plgpu.wgmma_accumulator_load(pairs, wait_n=1) * decays
                    weights = scores * decays
                    both = scores * pairs
                    strict = jnp.sum(jnp.where(_iota(0) != _iota(1), both, 0.0), 1)
                    return pairs, weights.astype(jnp.bfloat16), strict, jnp.sum(both, 1), plgpu.wgmma_accumulator_load(read)

                tiles = (plgpu.ACC((CHUNK, CHUNK), jnp.float32),) * 2
                pairs, weights, strict, all_, read = pl.run_scoped(products, *tiles)
                if side == QUERIES:
                    scale = weight = jnp.exp2(sums)
                else:
                    step = mosaic.load(ref.step_.at[slot], BY_ROW)
                    scale = jnp.exp2(ref.sums_[slot, CHUNK - 1] - sums)
                    weight, pairs = scale * step, pairs * _spread(step, 0, CHUNK)
                read = read * _spread(scale, 0, PART)
                mine = _values(values.at[slot])
                of_state = jnp.sum(mine * read, 1)
                mine = (mine * _spread(weight, 0, PART)).astype(jnp.bfloat16)
                _multiply(ref, side, sum_, mine, state)
                _multiply(ref, side, sum_, pairs.astype(jnp.bfloat16), other)
                if side == QUERIES:
                    give('later', strict + of_state)
                    give('across', jnp.sum(_values(ref.entering_.at[slot]) * _values(ref.leaving_.at[slot]), 1))
                else:
                    for name, value in (('strict', strict), ('added', of_state), ('dstep', all_ + of_state)):
                        give(name, value)

                    def within(dx):
                        _multiply(ref, side, dx, weights, others.at[slot])
                        return plgpu.wgmma_accumulator_load(dx)

                    dx = read + pl.run_scoped(within, plgpu.ACC((CHUNK, PART), jnp.float32))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    ref.dx_[...] = (dx * _spread(step, 0, PART)).astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    mosaic.send(ref.dx_, ref.dx, call.values(row, chunk, unit))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(ref.used.at[slot])

            def whole(sum_):
                scores = pl.run_scoped(scored, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
                lax.fori_loop(0, in_group, lambda n, _: turn(n, scores, sum_), None)
                return sum_[...]

            value = pl.run_scoped(whole, plgpu.ACC((CHUNK, call.keys), jnp.float32))
            ref.sum_.at[side][...] = value.astype(jnp.bfloat16)
            plgpu.commit_smem()
            mosaic.send(ref.sum_, (ref.dqueries, ref.dkeys)[side], call.by_group(row, chunk, group), side)
            plgpu.wait_smem_to_gmem(0)

        thread = lax.axis_index('group')
        for side in (QUERIES, BY_KEYS):

            @pl.when(thread == side)
            def _(side=side):
                plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
                compute(side)

        @pl.when(thread == FETCHES)
        def _():
            plgpu.set_max_registers(FETCH_REGISTERS, action='decrease')
            produce()

    like = lambda name: jax.ShapeDtypeStruct(arrays[name].shape, jnp.bfloat16)
    outputs = {'dx': like('x'), 'dkeys': like('keys'), 'dqueries': like('queries')}
    outputs |= dict.fromkeys(VECTORS, jax.ShapeDtypeStruct((call.batch * call.units * call.length,), jnp.float32))
    scratch = {f'{name}_': _matrix(1, CHUNK, call.keys) for name in ('queries', 'keys')}
    scratch |= {f'{name}_': _matrix(SLOTS, CHUNK, PART) for name in ('x', 'dy')}
    scratch |= {f'{name}_': _matrix(SLOTS, PART, call.keys) for name in ('entering', 'leaving')}
    scratch |= {f'{name}_': plgpu.SMEM((SLOTS, CHUNK), jnp.float32) for name in ('sums', 'step')}
    scratch |= {'dx_': _matrix(CHUNK, PART), 'sum_': _matrix(2, CHUNK, call.keys)}
    scratch |= {
        'own': plgpu.Barrier(num_arrivals=2, num_barriers=1),
        'arrived': plgpu.Barrier(num_arrivals=6, num_barriers=SLOTS),
        'used': plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
    }
    grid = {'rows': call.batch, 'chunks': call.chunks, 'groups': call.groups}
    return _launch('ssd_gradients', call, body, arrays, outputs, scratch, grid, threads=3)


# ------------------------------------------------------------------------------------------------------ what they share
def _decays(rows: Any, columns: Any, turned: bool = False) -> Any:
    """Decays [CHUNK, CHUNK] between the tokens of a chunk, from their sums; rows are the later tokens, or the earlier."""
    exponent = _spread(rows, 0, CHUNK) - _spread(columns, 1, CHUNK)
    seen = _iota(0) <= _iota(1) if turned else _iota(0) >= _iota(1)
    return jnp.where(seen, jnp.exp2(-exponent if turned else exponent), 0.0)


def _multiply(ref: Any, group: int, sums: Any, tile: Any, other: Any) -> None:
    """Begins `sums += tile other` of a tile in registers, which Mosaic's interpreter takes from shared memory alone."""
    left = getattr(ref, 'left_', None)
    if left is None:
        plgpu.wgmma(sums, tile, other)
    else:
        left.at[group][...] = tile
        plgpu.commit_smem()
        plgpu.wgmma(sums, left.at[group], other)


def _values(place: Any) -> Any:
    return plgpu.load(place, layout=WGMMA).astype(jnp.float32)


def _spread(x: Any, axis: int, size: int) -> Any:
    """A vector of a tile's axis over the tile, whose other axis is of this size."""
    shape = (CHUNK, size) if axis == 0 else (size, CHUNK)
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (axis,)), WGMMA)


def _iota(axis: int) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=WGMMA)


def _matrix(*shape: int) -> Any:
    """Shared memory for matrices as tensor cores take them."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _states(call: _Call) -> Any:
    return jax.ShapeDtypeStruct((call.batch * call.chunks * call.units * PART, call.keys), jnp.bfloat16)


def _launch(
    name: str,
    call: _Call,
    body: Callable[[Any], None],
    arrays: Mapping[str, jax.Array],
    outputs: Mapping[str, Any],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    threads: int = 1,
) -> dict[str, jax.Array]:
    if call.interpret is not None:
        scratch = {**scratch, 'left_': _matrix(2, CHUNK, CHUNK)}
    names = (*arrays, *outputs, *scratch)
    assert len(set(names)) == len(names), names
    kernel = plgpu.kernel(
        lambda *refs: body(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        out_type=tuple(outputs.values()),
        scratch_types=tuple(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name='group',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=mosaic_core.LoweringSemantics.Lane,
        ),
        kernel_name=name,
        **({} if call.interpret is None else {'interpret': call.interpret}),
    )
    return dict(zip(outputs, kernel(*arrays.values()), strict=True))
