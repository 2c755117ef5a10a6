"""Tile sizes of the kernels, and when time is split. `python -m kernels_pallas.tune` measures them on a GPU."""

import json
import pathlib
from dataclasses import dataclass

TABLE = pathlib.Path(__file__).with_name('tuned.json')


@dataclass(frozen=True)
class Settings:
    """Sizes that change speed and memory, not results."""

    forward_tile: int  # steps a tile of time
    unroll: int  # steps written out
    backward_tile: int  # steps between the states that are kept for the backward pass
    stretch: int  # steps whose states are in registers at once


# What compiles without spilling everywhere; the table overrides it where somebody has measured.
FALLBACK = {
    'hopper': Settings(forward_tile=32, unroll=2, backward_tile=16, stretch=4),
    'ampere': Settings(forward_tile=16, unroll=2, backward_tile=16, stretch=4),
}


def settings(generation: str, states: int, item_bytes: int, readout: bool) -> Settings:
    """Returns the tile sizes for a GPU generation, a number of states and the size of u's elements."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    found = table.get(generation, {}).get(key(states, item_bytes, readout))
    if found:
        return Settings(**found)
    base = FALLBACK[generation]
    # Shared memory: rows of u, dt, z and of B, C grow with the element and with the states.
    tile = max(16, base.forward_tile // (2 if item_bytes > 2 or states > 32 else 1))
    return Settings(tile, min(base.unroll, 1 if states > 16 or readout else 2), base.backward_tile, 2 if readout else 4)


def key(states: int, item_bytes: int, readout: bool) -> str:
    """The table's name for a case."""
    return f'N{states}-{8 * item_bytes}bit' + ('-readout' if readout else '')


def time_splits(blocks: int, length: int, cores: int, tile: int) -> int:
    """Into how many slices the time is split: the most that fill the GPU, for blocks = batch * channels / 128.

    A split costs one more pass over the inputs (about 0.7 of a forward pass), so it must win a factor of two at least: the
    first power of two that gives every multiprocessor two blocks, while a slice keeps eight tiles; none
    where half of that is reached without.
    """
    if 2 * blocks > cores * 2:
        return 1
    splits = 1
    while splits * blocks < 2 * cores and length >= 16 * tile * splits:
        splits *= 2
    return splits if splits > 2 else 1
