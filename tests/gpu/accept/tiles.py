"""Tile sizes of the selective scan, timed beside those in use, forward and backward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import cases, platform
from kernels_pallas.selective_scan import mosaic_gpu
from kernels_pallas.selective_scan.cases import draw
from kernels_pallas.selective_scan.mosaic_gpu import tuning

SHAPE = (8, 4096, 4096, 16)  # B, T, D, N
FORWARD = [(16, 2), (32, 1), (32, 4), (64, 2)]  # tile, steps written out
BACKWARD = [(8, 4), (16, 2), (16, 8), (32, 4)]  # tile, steps in registers at once


def measure(say: Callable[[dict[str, Any]], None]) -> None:
    """Says the milliseconds of every candidate; one that does not compile is named with its error."""
    arrays = draw(SHAPE, jnp.bfloat16, True, True, True, False, False)
    dy = jax.random.normal(jax.random.key(1), arrays['u'].shape, jnp.bfloat16)
    current = tuning.settings(tuning.generation(platform.compute_capability()), 16, 2, False)
    ahead = [replace(current, forward_tile=tile, unroll=unroll) for tile, unroll in FORWARD]
    back = [replace(current, backward_tile=tile, stretch=stretch) for tile, stretch in BACKWARD]
    for settings in (current, *ahead, *back):

        def forward(arrays, settings=settings):
            return mosaic_gpu.scan(**arrays, dt_softplus=True, splits=1, settings=settings)[0]

        def both(arrays, dy, forward=forward):
            y, pull = jax.vjp(forward, arrays)
            return y, pull(dy)

        try:
            say({'tiles': str(settings), 'forward': cases.milliseconds(forward, arrays)})
            if settings not in ahead:
                say({'tiles': str(settings), 'both': cases.milliseconds(both, arrays, dy)})
        except Exception as error:  # of any kind: compiler, driver, memory
            say({'tiles': str(settings), 'refused': f'{type(error).__name__}: {str(error).strip()}'[:300]})
