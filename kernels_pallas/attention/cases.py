"""What the GPU kernels of attention are verified and timed by; the oracle is dense, or blockwise where T is large."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import cudnn, reference, tokamax, xla
from kernels_pallas.cases import Arrays, Case, Outputs, Timed, random_starts

BF16 = jnp.bfloat16
DENSE = 1024  # tokens a row that the dense oracle takes


def draw(batch: int, length: int, heads: tuple[int, int], width: int) -> Arrays:
    keys = jax.random.split(jax.random.key(batch + length + width), 3)
    shapes = zip('qkv', keys, (heads[0], heads[1], heads[1]))
    return {name: jax.random.normal(key, (batch, length, count, width)).astype(BF16) for name, key, count in shapes}


def documents(share: float, batch: int, length: int) -> np.ndarray | None:
    """Segment ids of documents that start at such a share of the tokens, of different lengths of padding at the end.

    The first row begins with padding, too, and of three rows or more the last is padding alone.
    """
    starts = random_starts(share, batch, length)
    if starts is None:
        return None
    ids = 1 + np.cumsum(starts, 1).astype(np.int32)
    for row in range(batch):
        ids[row, length - row * length // 7 :] = 0
    ids[0, : length // 50] = 0
    ids[2:][-1:] = 0
    return ids


def run(segment_ids: np.ndarray | None, width: int, form: str, arrays: Arrays) -> Outputs:
    """The same call by tokamax, cuDNN, dense or in blocks."""
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    given, scale = (arrays['q'], arrays['k'], arrays['v']), width**-0.5
    if form == 'tokamax':
        return (tokamax.attention(*given, ids, scale),)
    if form == 'cudnn':
        return (cudnn.attention(*given, scale),)
    function = reference.attention if form == 'dense' else xla.attention
    return (function(*given, ids, ids, 0, scale),)


def case(
    batch: int, length: int, heads: tuple[int, int], width: int, starts: float = 0.0, form: str = 'tokamax'
) -> Case:
    """A call with query and key heads by tokamax or cuDNN; of documents, or of whole rows."""
    ids = documents(starts, batch, length)
    call = functools.partial(run, ids, width)
    name = f'{batch}x{length} heads {heads[0]}/{heads[1]} of {width}' + (f' starts {starts:g}' if starts else '')
    name += ' cudnn' if form == 'cudnn' else ''
    drawn = functools.partial(draw, batch, length, heads, width)

    def refusal() -> str | None:
        shapes = jax.eval_shape(drawn)
        if form == 'cudnn':
            return cudnn.unsupported(**shapes, packed=ids is not None, cached=False)
        return tokamax.unsupported(**shapes, own_segments=False, q_offset=0)

    kernel = lambda arrays, interpret: call(form, arrays)  # the libraries' kernels cannot be interpreted
    oracle = functools.partial(call, 'dense' if length <= DENSE else 'blockwise')
    return Case(variant(form, width, ids is not None), name, drawn, kernel, oracle, refusal)


def variant(form: str, width: int, packed: bool) -> str:
    """The name of the card that a case is for."""
    (name,) = cudnn.variants(width) if form == 'cudnn' else tokamax.variants(width, packed)
    return name


CASES = [
    *(case(2, 512, (4, 2), width) for width in tokamax.WIDTHS),
    *(case(1, 1000, (3, 3), width) for width in tokamax.WIDTHS),
    case(2, 2048, (12, 3), 64),
    case(1, 2048, (8, 1), 128),
    case(2, 7, (4, 4), 64),
    *(case(3, 512, (4, 2), width, 0.01) for width in tokamax.WIDTHS),
    *(case(3, 999, (6, 2), width, 0.02) for width in tokamax.WIDTHS),
    *(case(2, 130, (4, 4), width, 0.5) for width in tokamax.WIDTHS),
    case(4, 2048, (12, 3), 64, 0.002),
    case(2, 4096, (8, 2), 128, 0.001),
    case(3, 33, (4, 1), 64, 0.1),
    *(case(2, 512, (4, 2), width, form='cudnn') for width in (64, 96, 128, 192, 256)),
    *(case(1, 1000, (3, 3), width, form='cudnn') for width in (64, 128, 256)),
    *(case(2, 2048, (8, 2), width, form='cudnn') for width in (64, 128, 256)),
    *(case(2, 8, (4, 1), width, form='cudnn') for width in (64, 80, 200)),
]


def timed(
    batch: int, length: int, heads: tuple[int, int], width: int, document: int | None, form: str = 'tokamax'
) -> Timed:
    """Rows of documents of one length; by XLA, blocks of keys and queries."""
    ids = None if document is None else np.tile(1 + np.arange(length, dtype=np.int32) // document, (batch, 1))
    call: Any = functools.partial(run, ids, width)
    first = lambda form: lambda arrays: call(form, arrays)[0]
    tokens, (query_heads, key_heads) = 2 * batch * length * width, heads  # bytes a head of bfloat16
    forward, both = 2 * query_heads + 2 * key_heads, 6 * query_heads + 6 * key_heads
    keys = (length if document is None else document) / 2
    name = f'B{batch} T{length} heads {query_heads}/{key_heads} of {width}'
    name += (' cudnn' if form == 'cudnn' else '') if document is None else f' documents of {document}'
    return Timed(
        variant(form, width, ids is not None),
        name,
        functools.partial(draw, batch, length, heads, width),
        first(form),
        first('blockwise'),
        forward * tokens,
        both * tokens,
        batch * query_heads * length * keys,
    )


TIMED = [
    timed(16, 2048, (12, 3), 64, None),
    timed(16, 2048, (12, 3), 64, 512),
    timed(4, 4096, (32, 8), 128, None),
    timed(1, 16384, (32, 8), 128, 2048),
    *(timed(2, 8192, (32, 8), 128, document) for document in (512, None)),
    timed(16, 2048, (12, 3), 64, None, 'cudnn'),
    timed(4, 4096, (32, 8), 128, None, 'cudnn'),
]
