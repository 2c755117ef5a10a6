"""What the scan's GPU kernels are verified and timed by; the oracle is XLA's form in chunks, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Arrays, Case, Outputs, Timed, random_starts
from kernels_pallas.selective_scan import mosaic_gpu, scaled_mosaic_gpu, selective_scan

BF16, F32 = jnp.bfloat16, jnp.float32
Shape = tuple[int, int, int, int]  # B, T, D, N


def draw(shape: Shape, dtype: Any, gate: bool, softplus: bool, skip: bool, readout: bool, state: bool) -> Arrays:
    """Every array that is differentiated; seeded by the shape."""
    batch, length, channels, states = shape
    keys = iter(jax.random.split(jax.random.key(sum(shape)), 12))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    tokens = lambda: normal(batch, length, channels).astype(dtype)
    rates = jnp.broadcast_to(jnp.arange(1.0, states + 1), (channels, states))
    arrays = {'u': tokens(), 'dt': tokens() if softplus else jnp.abs(tokens()) * 0.3}
    arrays |= {'A': -rates * jnp.exp(0.1 * normal(channels, states))}
    arrays |= {'B': normal(batch, length, states), 'C': normal(batch, length, states)}
    if skip:
        arrays['D'] = normal(channels)
    if softplus:
        arrays['dt_bias'] = normal(channels) - 4
    if gate:
        arrays['z'] = tokens()
    if state:
        arrays['initial_state'] = normal(batch, channels, states)
    if readout:
        arrays |= {'Z': 0.3 * normal(states, states), 'g': 1 + normal(states)}
    return arrays


def case(
    variant: str,
    shape: Shape,
    dtype: Any = F32,
    *,
    resets: float = 0.0,
    plain: bool = False,
    small: bool = False,
    readout: bool = False,
    **options: Any,
) -> Case:
    """A case with gate, softplus, skip and initial state, or `plain` without; `options` are the kernel's."""
    scaled = variant in scaled_mosaic_gpu.VARIANTS
    readout = readout or scaled
    prior = options.get('prior', False)
    full = not plain
    drawn = functools.partial(draw, shape, dtype, full and not prior, full, full and not prior, readout, full)
    reset = random_starts(resets, *shape[:2])

    def kernel(arrays: Arrays, interpret: Any) -> Outputs:
        here = {} if interpret is None else {'interpret': interpret}
        if scaled:  # which has no options
            return scaled_mosaic_gpu.scan(**arrays, dt_softplus=full, reset=reset, **here)
        here |= {} if interpret is None else {'generation': 'hopper', 'cores': 132}
        return mosaic_gpu.scan(**arrays, dt_softplus=full, reset=reset, **options, **here)

    def oracle(arrays: Arrays) -> Outputs:
        arrays = dict(arrays)
        weights = (arrays.pop('Z'), arrays.pop('g'), None) if readout else None
        found = selective_scan(
            **arrays, dt_softplus=full, reset=reset, prior=prior, readout=weights, implementation='chunked_associative'
        )
        return (found[2], found[1]) if prior else found

    words = ['x'.join(map(str, shape)), jnp.dtype(dtype).name, *(['plain'] if plain else [])]
    words += ['resets'] if resets else []
    words += ['readout'] if readout else []
    words += [f'{name}={value}' for name, value in options.items()]
    element = jnp.dtype(dtype)
    lacks = functools.partial(scaled_mosaic_gpu.unsupported, prior=False) if scaled else mosaic_gpu.unsupported
    refusal = lambda: lacks(F32, element, shape[3], readout)
    return Case(variant, ' '.join(words), drawn, kernel, oracle, refusal, small)


CASES = [
    case('scan', (1, 19, 128, 8), resets=0.1, small=True),
    case('scan', (2, 300, 256, 16), BF16, resets=0.02),
    case('scan', (2, 300, 256, 16), resets=0.02),
    case('scan', (3, 257, 200, 8)),
    case('scan', (1, 1, 5, 3)),
    case('scan', (3, 257, 128, 16), resets=0.02),  # tiles of one run of bytes, which must not lead over a row's end
    case('scan', (2, 97, 100, 16), BF16),
    case('scan', (1, 100, 384, 16), plain=True),
    case('scan', (4, 2048, 1024, 16), BF16, resets=0.002),
    case('wide', (1, 65, 128, 64), resets=0.05),
    case('wide', (1, 70, 128, 64), BF16, resets=0.05),
    case('wide', (1, 100, 384, 24), plain=True),
    case('wide', (1, 640, 128, 32), resets=0.01, splits=2),
    case('wide', (1, 70, 128, 32), resets=0.05, prior=True),
    case('sliced', (1, 1000, 256, 16), resets=0.01, splits=4),
    case('sliced', (1, 4096, 256, 16), BF16, resets=0.002),
    case('sliced', (1, 640, 128, 16), prior=True, splits=2),
    case('sliced', (1, 640, 128, 16), resets=0.01, readout=True, splits=2),
    case('kept', (2, 1000, 256, 16), resets=0.01, keep_every=64),
    case('kept', (2, 97, 128, 16), BF16, resets=0.02, keep_every=96),
    case('prior', (2, 200, 256, 16), resets=0.01, prior=True),
    case('prior', (2, 200, 200, 16), BF16, resets=0.01, prior=True),
    case('readout', (2, 200, 256, 16), resets=0.01, readout=True),
    case('readout', (2, 130, 200, 16), BF16, resets=0.01, readout=True),
    case('scaled', (1, 19, 128, 16), resets=0.1, small=True),
    case('scaled', (2, 203, 256, 16), resets=0.02),
    case('scaled', (3, 257, 128, 9), BF16, resets=0.02),  # tiles of one run of bytes, and states that fill no tile
    case('scaled', (1, 100, 384, 16), plain=True),
    case('scaled', (2, 2048, 512, 16), BF16, resets=0.002),
]


def timed(variant: str, batch: int, length: int, channels: int, compare: bool = False, **options: Any) -> Timed:
    """With gate, softplus, skip and 16 states, in bfloat16."""
    scaled = variant in scaled_mosaic_gpu.VARIANTS
    readout = scaled or variant == 'readout'
    drawn = functools.partial(draw, (batch, length, channels, 16), BF16, True, True, True, readout, False)
    run = scaled_mosaic_gpu.scan if scaled else mosaic_gpu.scan
    kernel = lambda arrays: run(**arrays, dt_softplus=True, **options)[0]
    other = lambda arrays: selective_scan(**arrays, dt_softplus=True, implementation='chunked')[0]
    elements = batch * length * channels  # of u, dt, z and y, and with a gradient once more the first three, and theirs
    name = f'B{batch} T{length} D{channels} N16 bfloat16'
    # A state's decay, and the two of a Swish; backwards the decay of states that are replayed, twice, and the Swish.
    special = {'exponentials': 48 * elements, 'both_exponentials': 112 * elements}
    special = special if readout else {'exponentials': 16 * elements}
    compared = other if compare else None
    return Timed(variant, name, drawn, kernel, compared, 8 * elements, 22 * elements, **special)


TIMED = [
    timed('scan', 8, 4096, 4096, compare=True),
    timed('scan', 16, 2048, 1536),
    timed('sliced', 2, 2048, 2048),
    timed('sliced', 1, 65536, 4096),
    timed('readout', 8, 4096, 4096),
    timed('scaled', 8, 4096, 4096),
]
