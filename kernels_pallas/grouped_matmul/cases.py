"""What the GPU kernels of the grouped product are verified and timed by; the oracle is every matrix on every row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import Arrays, Case, Outputs, Timed
from kernels_pallas.grouped_matmul import api, reference, tokamax

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


def run(group_sizes: np.ndarray, form: str, arrays: Arrays) -> Outputs:
    """The same call by tokamax, in blocks, or every matrix on every row."""
    given = arrays['x'], arrays['w'], jnp.asarray(group_sizes)
    if form == 'blocked':
        return (api.grouped_matmul(*given, implementation='blocked'),)
    return ((tokamax.grouped_matmul if form == 'tokamax' else reference.grouped_matmul)(*given),)


def case(rows: int, groups: int, width: int, columns: int, spread: float = 0.5, empty: int = 0) -> Case:
    """Groups of random sizes."""
    call = functools.partial(run, sizes(rows, groups, spread, empty))
    name = f'{rows} rows of {width} to {columns}, {groups} groups, spread {spread:g}' + (
        f' empty {empty}' * bool(empty)
    )
    drawn = functools.partial(draw, rows, groups, width, columns)

    def refusal() -> str | None:
        return tokamax.unsupported(**jax.eval_shape(drawn))

    kernel = lambda arrays, interpret: call('tokamax', arrays)  # the library's kernels cannot be interpreted
    return Case('bfloat16', name, drawn, kernel, functools.partial(call, 'reference'), refusal)


CASES = [
    case(512, 4, 128, 256),
    case(1000, 5, 192, 64, empty=2),
    case(4096, 8, 768, 832),
    case(4096, 64, 256, 320, spread=3.0),
    case(3, 2, 64, 64),
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
    return Timed('bfloat16', name, drawn, first('tokamax'), first('blocked'), moved, 3 * moved)


TIMED = [timed(65536, 8, 768, 832), timed(65536, 64, 1024, 1024)]
