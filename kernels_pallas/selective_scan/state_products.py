"""Products over a channel's 16 states by a warp's tensor cores, on arrays as they lie in the scan's registers.

`mma.m16n8k16` multiplies bfloat16 and sums in float32. A factor is split in two, `x = high + low`, and three of the
four products are summed, so that a term is right to 2^-16. A warp holds 32 channels, four lanes a channel, four states
each (`LAYOUT`). That is how the instruction takes its left factor and returns its sums, but for the order of states: to
thread (g, q) of 8 x 4 lanes belong the instruction's 2q, 2q + 1 and 8 more than those, which are here the states 4q to
4q + 3. So nothing is moved but the other factor, once, before the kernel (`fragments`), and the sums that `outer`
returns, once, after it (`unfolded`).

The layouts of fragments are those of the PTX ISA 9, "Matrix multiply-accumulate operation using mma instruction".
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import vector as mlir_vector

from kernels_pallas import mosaic

WARPS, LANES, STATES = 4, 32, 16
HALF, FLOAT = jnp.bfloat16, jnp.float32

# (4, 32, 16): thread (g, q) of a warp holds the states 4q to 4q + 3 of the channels g, g + 8, g + 16 and g + 24.
LAYOUT = mosaic.tiled(((WARPS, LANES, STATES), (1, 8, 4)), (-6,), (-2, -4))
# (32, 4): a row a lane, in every warp
BY_LANE = plgpu.Layout.TILED(fragmented_array.Tiling(((LANES, 4),)), (fragmented_array.Replicated(WARPS),), (-2,), -1)
FOLDED = mosaic.tiled(((WARPS, 8, STATES), (1, 8, 4)), (-6,), (-2, -4))  # (4, 8, 16): LAYOUT of a channel in four
SUMS = mosaic.tiled(((WARPS, LANES, 8), (1, 1, 8)), (-6,), (-5,))  # (4, 32, 8): eight numbers a thread

Parts = tuple[jax.Array, jax.Array]  # high, low


def fragments(matrix: jax.Array) -> jax.Array:
    """A right factor [16, 16] as `multiply` takes it, int32 [2, 32, 4]: both parts, four registers a lane."""
    # Register (n, r) of thread (g, q) holds the terms 4q + 2r and the next, of the state 4 (g // 2) + 2n + g % 2.
    parts = jnp.stack(_halves(matrix.astype(FLOAT))).reshape(2, 4, 2, 2, 4, 2, 2)  # part, q, r, pair, g // 2, n, g % 2
    pairs = parts.transpose(0, 4, 6, 1, 5, 2, 3).reshape(2, LANES, 4, 2)
    return lax.bitcast_convert_type(pairs, jnp.int32)


def unfolded(sums: jax.Array) -> jax.Array:
    """What `outer` returned, [..., 32, 8], as matrices [..., 16, 16]."""
    lead = sums.shape[:-2]
    parts = sums.reshape(-1, 4, 2, 4, 2, 2, 2)  # g // 2, g % 2, q, columns' half, rows' half, pair
    return parts.transpose(0, 1, 5, 2, 3, 4, 6).reshape(*lead, STATES, STATES)


def split(x: jax.Array, interpret: Any = None) -> Parts:
    """[4, 32, 16] of float32 in `LAYOUT` as the sum of two of bfloat16, to 2^-17 of each number."""
    if interpret is not None:
        return _halves(x)
    return _inlined(_split, (LAYOUT,), ((WARPS, LANES, STATES), HALF, LAYOUT), 2)(x)


def multiply(x: Parts, factor: Parts, initial: jax.Array, interpret: Any = None) -> jax.Array:
    """`initial + x @ matrix` over states, float32 [4, 32, 16].

    Args:
      x: [4, 32, 16] in `LAYOUT`, split.
      factor: both parts of `fragments(matrix)`, [32, 4] in `BY_LANE`.
      initial: like x, float32.
      interpret: parameters of Mosaic's interpreter, which has no such instruction: plain products take its place.
    """
    if interpret is not None:
        return initial + _products(x, (_matrix(factor[0]), _matrix(factor[1])), 'wlm,mn->wln')
    taken = (LAYOUT, LAYOUT, BY_LANE, BY_LANE, LAYOUT)
    return _inlined(_multiply, taken, ((WARPS, LANES, STATES), FLOAT, LAYOUT))(*x, *factor, initial)


def outer(x: Parts, y: Parts, interpret: Any = None) -> jax.Array:
    """The sums over a warp's channels of `x_n y_m`, float32 [4, 32, 8], for `unfolded`; x, y as in `multiply`."""
    if interpret is not None:
        parts = _products(x, y, 'wln,wlm->wnm').reshape(WARPS, 4, 2, 2, 4, 2, 2)
        return parts.transpose(0, 1, 3, 4, 5, 2, 6).reshape(WARPS, LANES, 8)
    return _inlined(_outer, (LAYOUT,) * 4, ((WARPS, LANES, 8), FLOAT, SUMS))(*x, *y)


def folded(x: jax.Array, interpret: Any = None) -> jax.Array:
    """The sums over the four channels that a thread holds, [4, 8, 16] in `FOLDED`."""
    if interpret is not None:
        return jnp.sum(x.reshape(WARPS, 4, 8, STATES), axis=1)
    return _inlined(_folded, (LAYOUT,), ((WARPS, 8, STATES), FLOAT, FOLDED))(x)


# ----------------------------------------------------------------------------------------------- as whole arrays
def _halves(x: jax.Array) -> Parts:
    high = x.astype(HALF)
    return high, (x - high.astype(FLOAT)).astype(HALF)


def _products(x: Parts, y: Parts, terms: str) -> jax.Array:
    product = lambda a, b: jnp.einsum(terms, a.astype(FLOAT), b.astype(FLOAT), precision='highest')
    return product(x[1], y[0]) + product(x[0], y[1]) + product(x[0], y[0])


def _matrix(part: jax.Array) -> jax.Array:
    """[16, 16] of [32, 4], as `fragments` made it."""
    pairs = lax.bitcast_convert_type(part, HALF).reshape(4, 2, 4, 2, 2, 2)  # g // 2, g % 2, q, n, r, pair
    return pairs.transpose(2, 4, 5, 0, 3, 1).reshape(STATES, STATES)


# -------------------------------------------------------------------------------------------------- by registers
class Instructions:
    """What fragments are made by, on registers of 32 bits a lane; and how Mosaic's vectors hold those."""

    # The first of two sources goes to the high half.
    MULTIPLY = (
        'mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};'
    )
    TURN = 'movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;'
    PACK = 'cvt.rn.bf16x2.f32 $0, $2, $1;'

    def multiply(self, sums: Sequence[Any], left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
        """`sums + left @ right` of 16 x 8, 16 x 16 and 16 x 8: 4, 4 and 2 registers."""
        kinds = [ir.F32Type.get()] * 4
        return list(utils.inline_ptx(self.MULTIPLY, *left, *right, *sums, result_types=kinds, convergent=True))

    def turn(self, register: Any) -> Any:
        """An 8 x 8 of bfloat16 turned round: row g, columns 2q and 2q + 1 a lane, before and after."""
        return utils.inline_ptx(self.TURN, register, result_types=register.type, convergent=True)

    def pack(self, first: Any, second: Any) -> Any:
        """Two float32 as two bfloat16, the first in the low half, to the nearest."""
        return utils.inline_ptx(self.PACK, first, second, result_types=ir.IntegerType.get_signless(32))

    def rest(self, number: Any, pair: Any, half: int) -> Any:
        """What is left of a float32 without a half of a pair."""
        word = ir.IntegerType.get_signless(32)
        bits = arith.andi(pair, mgpu.c(-65536, word)) if half else arith.shli(pair, mgpu.c(16, word))
        return arith.subf(number, arith.bitcast(ir.F32Type.get(), bits))

    def zero(self) -> Any:
        return mgpu.c(0.0, ir.F32Type.get())

    def add(self, a: Any, b: Any) -> Any:
        return arith.addf(a, b)

    def floats(self, vector: Any) -> list[Any]:
        """The float32 of one of Mosaic's registers, which holds what a thread has side by side."""
        return _parts(vector, ir.F32Type.get())

    def words(self, vector: Any) -> list[Any]:
        """The same as pairs of bfloat16, or as integers."""
        return _parts(vector, ir.IntegerType.get_signless(32))

    def vector(self, numbers: Sequence[Any]) -> Any:
        return mlir_vector.from_elements(ir.VectorType.get((len(numbers),), numbers[0].type), list(numbers))

    def halves(self, pairs: Sequence[Any]) -> Any:
        """Pairs as a vector of bfloat16."""
        return mlir_vector.bitcast(ir.VectorType.get((2 * len(pairs),), ir.BF16Type.get()), self.vector(pairs))


def split_of(of: Any, numbers: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """`split` by registers: pairs of both parts, of numbers side by side."""
    high = [of.pack(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]
    rest = [of.rest(number, high[i // 2], i % 2) for i, number in enumerate(numbers)]
    return high, [of.pack(*rest[i : i + 2]) for i in range(0, len(rest), 2)]


def product_of(of: Any, x: Sequence[Any], factor: Sequence[Any], initial: Sequence[Any]) -> list[list[Any]]:
    """`multiply` by a warp's registers: sums [channel of 4][state of 4].

    Args:
      of: `Instructions`.
      x: both parts [channel of 4][pair of 2].
      factor: both parts [4].
      initial: like what is returned.
    """
    found: list[list[Any]] = []
    for first in (0, 2):  # channels g + 8 first and 8 more: rows g and g + 8
        halves = []
        for n in range(2):
            sums = [initial[first + row][2 * n + j] for row in range(2) for j in range(2)]
            for a, b in ((1, 0), (0, 1), (0, 0)):
                left = [x[a][first + row][r] for r in range(2) for row in range(2)]
                sums = of.multiply(sums, left, [factor[b][2 * n + r] for r in range(2)])
            halves.append(sums)
        found += [[halves[n][2 * row + j] for n in range(2) for j in range(2)] for row in range(2)]
    return found


def outer_of(of: Any, x: Sequence[Any], y: Sequence[Any]) -> list[Any]:
    """`outer` by a warp's registers: eight sums; x and y as in `product_of`."""
    sums = [[of.zero()] * 4 for _ in range(2)]
    for first in (0, 2):  # 16 channels are the terms of a sum
        left, right = (
            [[[of.turn(pair) for pair in part[first + term]] for term in range(2)] for part in parts]
            for parts in (x, y)
        )
        for n in range(2):
            for a, b in ((1, 0), (0, 1), (0, 0)):
                rows = [left[a][term][row] for term in range(2) for row in range(2)]
                sums[n] = of.multiply(sums[n], rows, [right[b][term][n] for term in range(2)])
    return sums[0] + sums[1]


# ------------------------------------------------------------------------------------------------ Mosaic's arrays
def _inlined(function: Callable[..., list[Any]], taken: tuple, returned: tuple, count: int = 1) -> Any:
    """A function of Mosaic's registers as one of arrays.

    Args:
      function: takes `Instructions` and a list of registers for each array, and returns one, those of `count` arrays
        one after the other.
      taken: layouts of the arrays that it takes.
      returned: shape, type and layout of those that it returns.
      count: how many.
    """
    shape, dtype, layout = returned

    def inline(_: Any, *arrays: Any) -> Any:
        place = layout.to_mgpu()
        registers = function(Instructions(), *(list(array.registers.flatten()) for array in arrays))
        whole = np.empty(len(registers), dtype=object)
        whole[:] = registers
        parts = whole.reshape(count, *place.registers_shape(shape))
        found = tuple(mgpu.FragmentedArray(_registers=part, _layout=place, _is_signed=None) for part in parts)
        return found if count > 1 else found[0]

    one = plgpu.ShapeDtypeStruct(shape, dtype, layout)
    return plgpu.inline_mgpu(arg_types=taken, return_type=(one,) * count if count > 1 else one)(inline)


def _parts(vector: Any, dtype: Any) -> list[Any]:
    """A vector's parts of 32 bits."""
    size = mgpu.bitwidth(vector.type) // 32
    whole = mlir_vector.bitcast(ir.VectorType.get((size,), dtype), vector)
    place = ir.DenseI64ArrayAttr.get
    return [mlir_vector.extract(whole, dynamic_position=[], static_position=place([i])) for i in range(size)]


def _split(of: Any, x: Sequence[Any]) -> list[Any]:
    parts = zip(*(split_of(of, of.floats(vector)) for vector in x))
    return [of.halves(pairs) for part in parts for pairs in part]


def _multiply(of: Any, high: Any, low: Any, factor_high: Any, factor_low: Any, initial: Any) -> list[Any]:
    x = [[of.words(vector) for vector in part] for part in (high, low)]
    factor = [of.words(part[0]) for part in (factor_high, factor_low)]
    found = product_of(of, x, factor, [of.floats(vector) for vector in initial])
    return [of.vector(sums) for sums in found]


def _outer(of: Any, x_high: Any, x_low: Any, y_high: Any, y_low: Any) -> list[Any]:
    x, y = ([[of.words(vector) for vector in part] for part in parts] for parts in ((x_high, x_low), (y_high, y_low)))
    return [of.vector(outer_of(of, x, y))]


def _folded(of: Any, x: Sequence[Any]) -> list[Any]:
    add = of.add
    return [of.vector([add(add(a, b), add(c, d)) for a, b, c, d in zip(*(of.floats(vector) for vector in x))])]
