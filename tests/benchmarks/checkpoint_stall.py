"""How long a save holds up training: the wait until the loop may go on, against writing to the end.

The state is that of an AdamW run: parameters and two moments, float32. The save itself goes on in the background and
competes with the steps for cores, which is the rest of its cost on a CPU: the time of a matrix product while a save
runs is printed beside that while none does.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mixcon_jax.runs.checkpoints import Checkpoints, Meta
from mixcon_jax.runs.checksums import checksums
from mixcon_jax.trees import named_leaves

SAVES = 5


def make_state(parameters: int, arrays: int = 60) -> dict:
    """Random parameters, as noise does not compress, in arrays of equal size, with two moments each."""
    rng = np.random.default_rng(0)
    noise = lambda: {f'w{i}': jnp.asarray(rng.standard_normal(parameters // arrays, np.float32)) for i in range(arrays)}
    return {'params': noise(), 'opt_state': {'mu': noise(), 'nu': noise()}, 'step': jnp.int32(0)}


def best_of(function: Callable[[], None], repeats: int = 5) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(parameters: int, folder: Path) -> dict[str, float]:
    """Seconds: ``stall`` until a save returns, ``write`` until it is complete, ``checksums`` within the stall,
    ``restore`` with verification, and of a product ``alone`` and ``beside`` a save.
    """
    state = jax.block_until_ready(make_state(parameters))
    matrix = jnp.ones((768, 768))
    product = jax.jit(lambda x: x @ x)
    work = lambda: jax.block_until_ready(product(matrix))
    work()
    alone, checkpoints = best_of(work), Checkpoints(folder, keep_last=2)
    stalls, writes, beside = [], [], []
    for step in range(SAVES):
        begin = time.perf_counter()
        checkpoints.save(state, Meta(step, {}))
        stalls.append(time.perf_counter() - begin)
        beside.append(best_of(work, 3))
        checkpoints.wait()
        writes.append(time.perf_counter() - begin)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restore = best_of(lambda: jax.block_until_ready(checkpoints.restore(abstract)[0]), 2)
    checkpoints.close()
    return {
        'stall': min(stalls), 'write': min(writes), 'checksums': best_of(lambda: checksums(named_leaves(state)), 3),
        'restore': restore, 'alone': alone, 'beside': min(beside),
    }  # fmt: skip


def main() -> None:
    print('Checkpoints: seconds a save stalls the loop, against waiting until it is written')
    columns = ('stall', 'checksums', 'write', 'restore')
    print(f'{"parameters":>12} {"MB":>6}' + ''.join(f'{name:>11}' for name in columns) + '  product beside a save')
    for parameters in (1_200_000, 12_000_000):
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(parameters, Path(folder))
        row = ''.join(f'{seconds[name]:>11.2f}' for name in columns)
        product = f'{1e3 * seconds["alone"]:.1f} -> {1e3 * seconds["beside"]:.1f} ms'
        print(f'{parameters:>12,} {12 * parameters / 1e6:>6.0f}{row}  {product}', flush=True)
        assert seconds['stall'] < seconds['write'], 'a save in the background must return before it is written'


if __name__ == '__main__':
    main()
