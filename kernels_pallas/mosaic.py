"""What the Mosaic kernels share: copies by Hopper's copy engine under the rules of the PTX ISA, tiles of time,
layouts, launching.

The copy engine moves a box of an array between global and shared memory by a tensor map. What it may not be asked for
is in `Copy.violations`; a copy that breaks a rule ends on the GPU with an illegal instruction, which neither JAX nor
the interpreter foresees. `fetch` and `send` are the only ways to it, and refuse such a copy while the kernel is traced.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import core as mosaic
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

GLOBAL_ALIGNMENT, SHARED_ALIGNMENT = 16, 128  # bytes, of boxes at either end
MAX_BOX, MAX_RANK, MAX_EXTENT, MAX_STRIDE = 256, 5, 2**32, 2**40
ALLOCATION = 1024  # bytes; every scratch array in shared memory starts at a multiple of it


# --------------------------------------------------------------------------------------------------------- indices
@dataclass(frozen=True)
class Index:
    """A traced integer with a number that is known to divide it: `Index(block) * 342 + Index(k) * 32` is even."""

    value: Any
    multiple: int = 1

    def __mul__(self, factor: int) -> 'Index':
        return Index(self.value * factor, self.multiple * factor)

    def __add__(self, other: 'Index') -> 'Index':
        return Index(self.value + other.value, math.gcd(self.multiple, other.multiple))


@dataclass(frozen=True)
class Span:
    """A box's extent on one axis of an array: `size` elements from `start` on."""

    start: Index
    size: int

    @property
    def ds(self) -> Any:
        """The same as an index of Pallas."""
        return pl.ds(self.start.value, self.size)


Box = Sequence[Any]  # an axis each: a Span, a traced integer for one element, or slice(None) for all


# ---------------------------------------------------------------------------------------------------------- copies
@dataclass(frozen=True)
class Copy:
    """One copy by the copy engine, by what is known of it when the kernel is traced.

    Attributes:
      itemsize: bytes of an element.
      shape: of the array in global memory.
      box: elements that are copied, an axis each.
      multiples: numbers that divide the box's first element on each axis; 0 where it is the axis's first.
      place: a number that divides the box's address in shared memory, in bytes.
      shared: elements of the place in shared memory.
      arrivals: how many copies the barrier's phase waits for, None for a copy that no barrier waits for.
      together: how many copies arrive in the phase.
      store: whether it goes to global memory.
    """

    itemsize: int
    shape: tuple[int, ...]
    box: tuple[int, ...]
    multiples: tuple[int, ...]
    place: int
    shared: int
    arrivals: int | None = None
    together: int | None = None
    store: bool = False

    def violations(self) -> list[str]:
        """The rules that it breaks (PTX ISA 9, "Tensors", `cp.async.bulk.tensor`; CUDA driver, cuTensorMapEncodeTiled).

        The array itself starts at a multiple of 256 bytes, as all of XLA's do.
        """
        found = []
        size, box_bytes = self.itemsize, math.prod(self.box) * self.itemsize
        if not 1 <= len(self.shape) <= MAX_RANK:
            found.append(f'an array of {len(self.shape)} axes, not of 1 to {MAX_RANK}')
        if max(self.box) > MAX_BOX:
            found.append(f'a box of {max(self.box)} elements on an axis, more than {MAX_BOX}')
        if max(self.shape) > MAX_EXTENT:
            found.append(f'an axis of {max(self.shape)} elements, more than {MAX_EXTENT}')
        if self.box[-1] * size % GLOBAL_ALIGNMENT:
            found.append(f'{self.box[-1] * size} bytes on the innermost axis, no multiple of {GLOBAL_ALIGNMENT}')
        if self.multiples[-1] * size % GLOBAL_ALIGNMENT:
            found.append(
                f'a box that starts at a multiple of {self.multiples[-1] * size} bytes on the innermost axis,'
                f' which need not be one of {GLOBAL_ALIGNMENT}'
            )
        for axis in range(1, len(self.shape)):
            stride = math.prod(self.shape[axis:]) * size
            if stride % GLOBAL_ALIGNMENT or stride >= MAX_STRIDE:
                found.append(f'a stride of {stride} bytes, no multiple of {GLOBAL_ALIGNMENT} below 2^40')
        if self.place % SHARED_ALIGNMENT:
            found.append(
                f'a place in shared memory at a multiple of {self.place} bytes, which need not be one of'
                f' {SHARED_ALIGNMENT}'
            )
        if self.shared * size != box_bytes:
            found.append(f'{box_bytes} bytes for a place of {self.shared * size}')
        if self.arrivals != self.together:
            found.append(f'{self.together} copies for a barrier of {self.arrivals} arrivals')
        if self.store and self.runs_on():
            found.append('a run of bytes that goes on in the next row where the box leads over the end of its axis')
        return found

    def runs_on(self) -> bool:
        """Whether what leads over the end of an axis lands in the array's next row, in place of being cut.

        JAX stores a box that is one run of bytes without a tensor map, and cuts it at the end of the array alone.
        """
        axis = next((axis for axis, size in enumerate(self.box) if size > 1), len(self.box) - 1)
        size, extent, multiple = self.box[axis], self.shape[axis], self.multiples[axis]
        one_run = self.box[axis + 1 :] == self.shape[axis + 1 :]
        stays_within = extent % size == 0 and multiple % size == 0
        return one_run and not stays_within and math.prod(self.shape[:axis]) > 1


class CopyError(ValueError):
    """A kernel asks the copy engine for what it cannot do."""


_records: list[list[Copy]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Copy]]:
    """Collects the copies of the kernels that are traced inside, checked or refused: for tests."""
    found: list[Copy] = []
    _records.append(found)
    try:
        yield found
    finally:
        _records.remove(found)


def fetch(copies: Sequence[tuple[Any, Box, Any]], slot: Any, barrier: Any) -> None:
    """Starts the copies of one tile, `(array, box, places)` each, into `places.at[slot]`.

    Args:
      copies: arrays in global memory with what to take of them; `places` is in shared memory, `[slots, *box]`. What
        lies beyond an array's end arrives as zeros.
      slot: of every `places`, and of the barriers.
      barrier: `[slots]` barriers, of as many arrivals as there are copies.

    Raises:
      CopyError: the copy engine cannot do it.
    """
    arrivals = barrier.aval.dtype.num_arrivals
    for array, box, places in copies:
        _check(array, box, places.shape[1:], places.dtype, arrivals, len(copies), store=False)
    for array, box, places in copies:
        plgpu.copy_gmem_to_smem(_part(array, box), places.at[slot], barrier.at[slot])


def fetch_ampere(copies: Sequence[tuple[Any, Box, Any]], slot: Any) -> None:
    """`fetch` by plain asynchronous copies, for `plgpu.wait_gmem_to_smem`; boxes must end within their arrays."""
    for array, box, places in copies:
        plgpu.copy_gmem_to_smem(_part(array, box), places.at[slot], oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def send(place: Any, array: Any, box: Box, slot: Any = None) -> None:
    """Starts to copy `place`, or its slot, from shared memory to a box of an array; what leads over its end is cut.

    Raises:
      CopyError: the copy engine cannot do it.
    """
    shape = place.shape if slot is None else place.shape[1:]
    _check(array, box, shape, place.dtype, None, None, store=True)
    plgpu.copy_smem_to_gmem(place if slot is None else place.at[slot], _part(array, box))


def _check(
    array: Any, box: Box, shape: Sequence[int], dtype: Any, arrivals: int | None, together: int | None, store: bool
) -> None:
    if array.dtype != dtype:
        raise CopyError(f'a copy from {array.dtype} to {dtype}')
    sizes, multiples = [], []
    for axis, length in zip(box, array.shape, strict=True):
        match axis:
            case Span():
                sizes.append(axis.size)
                multiples.append(axis.start.multiple)
            case slice():
                sizes.append(length)
                multiples.append(0)
            case _:
                sizes.append(1)
                multiples.append(1)
    itemsize, shared = jnp.dtype(dtype).itemsize, math.prod(shape)
    place = math.gcd(ALLOCATION, shared * itemsize)  # of any slot
    copy = Copy(itemsize, tuple(array.shape), tuple(sizes), tuple(multiples), place, shared, arrivals, together, store)
    for record in _records:
        record.append(copy)
    if broken := copy.violations():
        raise CopyError(
            f'the copy engine cannot copy {copy.box} of {array.dtype}{list(copy.shape)}: {"; ".join(broken)}'
        )


def _part(array: Any, box: Box) -> Any:
    place = tuple(axis.ds if isinstance(axis, Span) else axis for axis in box)
    return array.at[place]


# ----------------------------------------------------------------------------------------------------------- tiles
def slots(size: int, fetched: Mapping[str, tuple[Sequence[int], Any]], flying: int = 2, engine: bool = True) -> dict:
    """Scratch for tiles of time in flight: `name_` in shared memory for each array that is fetched, and a barrier.

    Args:
      size: tokens of a tile.
      fetched: by name, what a block takes of a token: shape and type.
      flying: tiles in flight.
      engine: whether the copy engine fetches; plain asynchronous copies need no barrier, `arrived`.
    """
    places = {f'{name}_': plgpu.SMEM((flying, size, *shape), dtype) for name, (shape, dtype) in fetched.items()}
    barrier = {'arrived': plgpu.Barrier(num_arrivals=len(places), num_barriers=flying)} if engine else {}
    return places | barrier


class Tiles:
    """A block's way through the tokens of its row, tile by tile, the next tile on its way to shared memory meanwhile.

    Args:
      ref: the refs of `launch`: arrays [B, T, ...] and the scratch of `slots`.
      size: tokens of a tile.
      count: tiles; the last may lead over the end, where the copy engine reads zeros and writes nothing.
      row: the block's first axis of the arrays.
      part: what the block takes of the axis after time.
      fetched: names of the arrays.
      whole: those of which it takes all.
      first: the first token of the first tile, if it is not the row's.
    """

    def __init__(
        self,
        ref: Any,
        size: int,
        count: int,
        row: Any,
        part: Span,
        fetched: Sequence[str],
        whole: Sequence[str] = (),
        first: Index | None = None,
    ) -> None:
        self.size, self.count = size, count
        self._row, self._part, self._first = row, part, first
        self._fetched = [(getattr(ref, name), getattr(ref, f'{name}_'), name not in whole) for name in fetched]
        self._barrier = getattr(ref, 'arrived', None)
        self.slots = self._fetched[0][1].shape[0]

    def box(self, array: Any, index: Any, cut: bool = True) -> Box:
        """A tile of an array [B, T, ...], and the block's part of it if it is cut."""
        start = Index(index) * self.size
        times = Span(start if self._first is None else self._first + start, self.size)
        inner: list[Any] = [slice(None)] * (len(array.shape) - 2)
        if inner and cut:
            inner[0] = self._part
        return self._row, times, *inner

    def start(self, index: Any, slot: Any) -> None:
        """Begins to fetch a tile."""
        index = index + 0 * self._row  # traced: a known start would be refused where the tile leads over the end
        copies = [(array, self.box(array, index, cut), places) for array, places, cut in self._fetched]
        if self._barrier is None:
            fetch_ampere(copies, slot)
        else:
            fetch(copies, slot, self._barrier)

    def arrive(self, slot: Any) -> None:
        """Waits until the copy engine has brought a tile; it is for `fence` to wait for plain copies."""
        if self._barrier is not None:
            plgpu.barrier_wait(self._barrier.at[slot])

    def fence(self) -> None:
        """Waits for all threads of the block; also orders shared memory for the copy engine."""
        if self._barrier is None:
            plgpu.wait_gmem_to_smem(0)  # Ampere has no fence for a copy engine; this wait brings a barrier
        else:
            plgpu.commit_smem()

    def wait(self, slot: Any) -> None:
        """Waits for a tile, and for every thread to be here: what was shared before may be overwritten after it."""
        self.arrive(slot)
        self.fence()

    def send(self, place: Any, array: Any, index: Any, slot: Any = None) -> None:
        """Begins to write a tile of results, or a slot of them, by the copy engine."""
        send(place, array, self.box(array, index), slot)

    def begin(self, reverse: bool = False) -> None:
        """Begins to fetch the tile that `fold` processes first."""
        self.start(self.count - 1 if reverse else 0, 0)

    def fold(self, process: Callable[[Any, Any, Any], Any], carry: Any, reverse: bool = False) -> Any:
        """After `begin`, `process(tile, slot, carry)` of every tile in turn, from the first or from the last.

        Results in shared memory, if there are any, must have a place of their own in every slot.

        Raises:
          ValueError: there is one slot, which is being processed while the next tile would come.
        """
        if self.slots < 2:
            raise ValueError('tiles that are fetched ahead need two slots')

        def one(k: Any, carry: Any) -> Any:
            index, slot = self.count - 1 - k if reverse else k, lax.rem(k, self.slots)
            self.wait(slot)

            @pl.when(k + 1 < self.count)
            def _() -> None:
                self.start(index - 1 if reverse else index + 1, lax.rem(k + 1, self.slots))

            return process(index, slot, carry)

        return lax.fori_loop(0, self.count, one, carry)


# --------------------------------------------------------------------------------------------------------- layouts
def tiled(tiling: Sequence[Sequence[int]], warp_dims: Sequence[int], lane_dims: Sequence[int]) -> Any:
    """A layout of Mosaic's fragmented arrays whose last dimension a thread holds as a vector."""
    layout = fragmented_array.TiledLayout(
        fragmented_array.Tiling(tuple(map(tuple, tiling))),
        tuple(warp_dims),
        tuple(lane_dims),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: Any, value: jax.Array) -> None:
    plgpu.store(ref, value, optimized=False)


# ------------------------------------------------------------------------------------------------------- launching
def launch(
    name: str,
    body: Callable[[Any], None],
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    interpret: Any,
) -> dict[str, jax.Array]:
    """Runs `body(refs)` in every block of a grid, compiled as all our kernels are; returns the outputs by name.

    Args:
      name: in profiles and dumps.
      body: takes a namespace of the refs of inputs, outputs and scratch.
      inputs: arrays.
      outputs: their shapes and types.
      scratch: shared memory and barriers.
      grid: blocks an axis, by the axis's name.
      interpret: parameters of Mosaic's interpreter, to run on a CPU; None compiles.
    """
    names = (*inputs, *outputs, *scratch)
    if len(set(names)) < len(names):
        raise ValueError(f'{name} has two arrays of one name among {", ".join(names)}')
    kernel = plgpu.kernel(
        lambda *refs: body(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        out_type=tuple(outputs.values()),
        scratch_types=tuple(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # exp2 is one instruction
            unsafe_no_auto_barriers=True,  # barriers are written out
            # Layouts are all given, so nothing needs to be inferred; this saves 20 instructions a step of the scan.
            lowering_semantics=mosaic.LoweringSemantics.Lane,
        ),
        kernel_name=name,
        **({} if interpret is None else {'interpret': interpret}),
    )
    return dict(zip(outputs, kernel(*inputs.values()), strict=True))
