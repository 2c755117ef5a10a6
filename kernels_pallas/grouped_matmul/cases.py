"""What the GPU kernels of the grouped product are verified and timed by; the oracle is every matrix on every row."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import Arrays, Case, Outputs, Timed
from kernels_pallas.grouped_matmul import api, mosaic_gpu, reference

BF16 = jnp.bfloat16


def draw(rows: int, groups: int, width: int, columns: int) -> Arrays:
    keys = jax.random.split(jax.random.key(rows + groups + width), 2)
    return {
        'x': jax.random.normal(keys[0], (rows, width)).astype(BF16),
        'w': (jax.random.normal(keys[1], (groups, width, columns)) * width**-0.5).astype(BF16),
    }


def sizes(rows: int, groups: int, spread: float, empty: int = 0) -> np.ndarray:
    """Rows of each group: the more unlike, the larger the spread; the last of them none, some rows in no group."""
    shares = np.random.default_rng(rows + groups).dirichlet(np.full(groups, 1 / spread))
    found = np.floor(shares * rows).astype(np.int32)
    found[groups - empty :] = 0
    return found


def run(group_sizes: np.ndarray, form: str, arrays: Arrays, interpret: Any = None) -> Outputs:
    """The same call by our kernels, in blocks, or every matrix on every row."""
    given = arrays['x'], arrays['w'], jnp.asarray(group_sizes)
    if form == 'mosaic_gpu':
        return (mosaic_gpu.grouped_matmul(*given, interpret),)
    if form == 'blocked':
        return (api.grouped_matmul(*given, implementation='blocked'),)
    return (reference.grouped_matmul(*given),)


def case(
    rows: int, groups: int, width: int, columns: int, spread: float = 0.5, empty: int = 0, small: bool = False
) -> Case:
    """Groups of random sizes."""
    call = functools.partial(run, sizes(rows, groups, spread, empty))
    name = f'{rows} rows of {width} to {columns}, {groups} groups, spread {spread:g}' + (
        f' empty {empty}' * bool(empty)
    )
    drawn = functools.partial(draw, rows, groups, width, columns)

    def refusal() -> str | None:
        return mosaic_gpu.unsupported(**jax.eval_shape(drawn))

    kernel = functools.partial(call, 'mosaic_gpu')
    return Case('bfloat16', name, drawn, kernel, functools.partial(call, 'reference'), refusal, small)


CASES = [
    case(512, 4, 128, 256),
    case(1000, 5, 192, 64, empty=2),
    case(4096, 8, 768, 832),
    case(4096, 64, 256, 320, spread=3.0),
    case(3, 2, 64, 64, small=True),
    case(777, 1, 256, 128),
    case(2048, 16, 1024, 512, spread=20.0, empty=1),
]


def timed(rows: int, groups: int, width: int, columns: int) -> Timed:
    """Groups of nearly the same size; the products, of which no floor is drawn, are 2 M D F operations each."""
    call = functools.partial(run, sizes(rows, groups, 0.01))
    first = lambda form: lambda arrays: call(form, arrays)[0]
    moved = 2 * (rows * (width + columns) + groups * width * columns)
    name = f'M{rows} E{groups} {width}x{columns} bfloat16'
    drawn = functools.partial(draw, rows, groups, width, columns)
    return Timed('bfloat16', name, drawn, first('mosaic_gpu'), first('blocked'), moved, 3 * moved)


TIMED = [timed(65536, 8, 768, 832), timed(65536, 64, 1024, 1024), timed(32768, 16, 2048, 5184)]
