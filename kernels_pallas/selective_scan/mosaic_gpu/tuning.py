"""Tile sizes of the kernels, and when time is split. `tests.gpu.accept --only tiles` times others on a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes that change speed and memory, not results."""

    forward_tile: int  # steps a tile of time
    unroll: int  # steps written out
    backward_tile: int  # steps between the states that are kept for the backward pass
    stretch: int  # steps whose states are in registers at once


# What compiles without spilling everywhere, and was the best measured on an H200 for 16 states in bfloat16.
BASE = {
    'hopper': Settings(forward_tile=32, unroll=2, backward_tile=16, stretch=4),
    'ampere': Settings(forward_tile=16, unroll=2, backward_tile=16, stretch=4),
}
# Cases whose backward tile of 16 steps exceeds a block's shared memory: 227 KiB, and 163 on A100.
SHORT = {
    'hopper': {'N64-32bit'},
    'ampere': {'N48-32bit', 'N64-16bit', 'N64-32bit', 'N16-32bit-readout'},
}


def generation(capability: tuple[int, int]) -> str:
    """Returns 'hopper' or 'ampere', by which kernels are written, for a compute capability."""
    return 'hopper' if capability >= (9, 0) else 'ampere'


def settings(generation: str, states: int, item_bytes: int, readout: bool) -> Settings:
    """Returns the tile sizes for a GPU generation, a number of states and the size of u's elements."""
    base = BASE[generation]
    # Shared memory: rows of u, dt, z and of B, C grow with the element and with the states.
    tile = max(16, base.forward_tile // (2 if item_bytes > 2 or states > 32 else 1))
    unroll = min(base.unroll, 1 if states > 16 or readout else 2)
    backward_tile = 8 if key(states, item_bytes, readout) in SHORT[generation] else base.backward_tile
    return Settings(tile, unroll, backward_tile, 2 if readout else base.stretch)


def key(states: int, item_bytes: int, readout: bool) -> str:
    """The name of a case in `SHORT`."""
    return f'N{states}-{8 * item_bytes}bit' + ('-readout' if readout else '')


def time_splits(blocks: int, length: int, cores: int, tile: int) -> int:
    """Into how many slices the time is split, a power of two, for blocks = batch * channels / 128.

    One where the blocks occupy more than three quarters of the multiprocessors. Else the first that gives every
    multiprocessor two blocks, as long as a slice keeps eight tiles.

    A split costs a pass for the slices' states, as long as the forward pass, and a shorter one for their cotangents.
    Milliseconds of one row of 65536 tokens and 4096 channels (32 blocks, N = 16, bfloat16) on an H200 with 132:

        slices                 1      2      4      8     16     32
        forward             9.31   8.77   4.64   3.74   3.65   3.56
        and backward        57.9   36.7   18.5   13.2  13.15   12.9

    Unsplit, the time stays the same up to one block a multiprocessor; split, it grows with the blocks. By these figures
    forward + backward breaks even at 1.07 blocks a multiprocessor and forward alone at 0.62: at three quarters training
    gains a factor of 1.4, and inference loses 1.2.
    """
    if 4 * blocks > 3 * cores:
        return 1
    splits = 1
    while splits * blocks < 2 * cores and 2 * splits * 8 * tile <= length:
        splits *= 2
    return splits
