"""What the GPU kernels of `ssd` are verified and timed by; the oracle is sequential, or in chunks where T is large."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import Arrays, Case, Outputs, Timed, random_starts
from kernels_pallas.ssd import api, mosaic_gpu, reference

SEQUENTIAL = 700  # tokens a row that the sequential oracle takes
ORDER = ('x', 'log_decay', 'B', 'C', 'step')


def draw(batch: int, length: int, heads: int, width: int, groups: int, keys: int) -> Arrays:
    """All in bfloat16, gradients of float32 arrays too: of products of bfloat16 they are no better."""
    drawn = jax.random.split(jax.random.key(batch + length + heads + width + keys), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape)
    arrays = {
        'x': normal(drawn[0], batch, length, heads, width),
        # From heads that hardly forget to such as forget at once.
        'log_decay': -jnp.abs(normal(drawn[1], batch, length, heads)) * jnp.geomspace(1e-3, 2.0, heads),
        'B': normal(drawn[2], batch, length, groups, keys) * keys**-0.5,
        'C': normal(drawn[3], batch, length, groups, keys),
        'step': jnp.abs(normal(drawn[4], batch, length, heads)),
        'initial_state': normal(drawn[5], batch, heads, width, keys),
    }
    return {name: value.astype(jnp.bfloat16) for name, value in arrays.items()}


def run(starts: np.ndarray | None, form: str, arrays: Arrays, interpret: Any = None) -> Outputs:
    """Outputs and final state by our kernels, in chunks, or token by token in the arrays' own type."""
    reset: Any = None if starts is None else jnp.asarray(starts)
    if form == 'chunked':
        return api.ssd(**arrays, reset=reset, implementation='chunked')
    wide = lambda name: arrays[name].astype(jnp.float32)
    x, log_decay, B, C, step = (arrays[name] for name in ORDER)
    if form == 'sequential':
        return reference.scan(x, log_decay, B, C, step, reset, arrays['initial_state'], False)
    given = x, wide('log_decay'), B, C, wide('step'), reset, wide('initial_state')
    y, final = mosaic_gpu.ssd(*given, interpret)
    return y, final.astype(jnp.bfloat16)


def unsupported(arrays: Arrays) -> str | None:
    decays = jax.ShapeDtypeStruct(arrays['log_decay'].shape, jnp.float32)
    return mosaic_gpu.unsupported(arrays['x'], decays, arrays['B'], arrays['C'], exclusive=False)


def case(
    batch: int,
    length: int,
    heads: int,
    width: int,
    groups: int,
    keys: int,
    starts: float = 0.0,
    small: bool = False,
) -> Case:
    """A call, of documents that start at such a share of the tokens."""
    reset = random_starts(starts, batch, length)
    call = functools.partial(run, reset)
    name = f'{batch}x{length} heads {heads}/{groups} of {width} by {keys}' + (f' starts {starts:g}' if starts else '')
    drawn = functools.partial(draw, batch, length, heads, width, groups, keys)
    oracle = functools.partial(call, 'sequential' if length <= SEQUENTIAL else 'chunked')
    kernel = functools.partial(call, 'mosaic_gpu')
    return Case(
        mosaic_gpu.variants(keys)[0], name, drawn, kernel, oracle, lambda: unsupported(jax.eval_shape(drawn)), small
    )


CASES = [
    case(1, 100, 3, 64, 1, 64, 0.03, small=True),
    case(2, 512, 4, 64, 2, 64, 0.01),
    case(1, 333, 2, 192, 1, 64),
    case(3, 64, 5, 64, 5, 64, 0.2),
    case(2, 4096, 8, 128, 1, 64, 0.002),
    case(1, 65, 1, 128, 1, 128, 0.1, small=True),
    case(2, 640, 6, 64, 2, 128, 0.01),
    case(1, 300, 2, 256, 1, 128),
    case(2, 700, 4, 128, 4, 128, 0.5),
    case(4, 2048, 24, 64, 1, 128, 0.002),  # of the ladder
]


def timed(batch: int, length: int, heads: int, width: int, groups: int, keys: int) -> Timed:
    """Whole rows, without an initial state; the exponentials are those of a chunk's pairs."""
    first = lambda form: lambda arrays: run(None, form, arrays)[0]
    tokens, exponentials = batch * length, batch * length * heads * mosaic_gpu.CHUNK
    # By head: x, y and two numbers of float32; then x, dy, dx and four. By group: B, C; then both and their gradients.
    forward = tokens * (heads * (4 * width + 8) + groups * 4 * keys)
    both = tokens * (heads * (10 * width + 24) + groups * 12 * keys)
    drawn = functools.partial(draw, batch, length, heads, width, groups, keys)
    name = f'B{batch} T{length} heads {heads}/{groups} of {width} by {keys}'
    variant = mosaic_gpu.variants(keys)[0]
    return Timed(variant, name, drawn, first('mosaic_gpu'), first('chunked'), forward, both, exponentials)


TIMED = [timed(16, 2048, 24, 64, 1, 128), timed(16, 2048, 24, 64, 1, 64), timed(4, 4096, 16, 128, 16, 64)]
