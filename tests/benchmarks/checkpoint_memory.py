"""How much host memory a save and a restore take beside the state itself, with one process and with two.

Every case runs in fresh processes on eight CPU devices, over which the state is split (``fsdp``). Each notes its peak
resident memory (VmHWM, set back before what is measured) above what it had before:

    save      the state is there; its copy comes on top, which is written while training would go on, and is read back
    restore   nothing is there; what comes are the parts of the own devices, host memory on a CPU, and all in between

The second restore wants every array split along another axis than it was written.
"""

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

DEVICES = 8
SLACK = 1 << 30  # bytes that a process may hold beside its own part of the state


def shapes(gib: float) -> dict[str, tuple[int, ...]]:
    """Of parameters: a few that are stacked over blocks, as large as they come, and some that are not."""
    rows = round(gib / 3 * 4096) // 8 * 8  # a third of the state is parameters, of which a row has 256 KiB
    return {f'stacked{i}': (8, rows // 8, 16, 1024) for i in range(3)} | {
        f'plain{i}': (rows, 16, 128) for i in range(8)
    } | {'scale': (1024,)}  # fmt: skip


def abstract_state(gib: float, axis: int):
    """A state like AdamW's whose arrays are split along an axis over all devices; what cannot be lies on each."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(jax.devices(), ('fsdp',))

    def leaf(shape):
        splits = len(shape) > axis
        spec = PartitionSpec(*[None] * axis, 'fsdp') if splits else PartitionSpec()
        return jax.ShapeDtypeStruct(shape, 'float32', sharding=NamedSharding(mesh, spec))

    tree = lambda: {name: leaf(shape) for name, shape in shapes(gib).items()}
    return {'params': tree(), 'opt_state': {'mu': tree(), 'nu': tree()}}


def made(abstract, seed: int):
    """Such a state of random bits, as noise does not compress."""
    import jax
    import numpy as np

    def part(index, shape):
        rng = np.random.default_rng([seed, *(each.start or 0 for each in index)])
        size = [len(range(*each.indices(n))) for each, n in zip(index, shape, strict=True)]
        return rng.integers(0, 1 << 30, size, np.int32).view(np.float32)

    make = lambda x: jax.make_array_from_callback(x.shape, x.sharding, lambda index: part(index, x.shape))
    return jax.tree.map(make, abstract)


def memory(field: str) -> int:
    """Bytes: VmRSS is what this process has now, VmHWM the most that it had."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def member(what: str, folder: str, rank: int, processes: int, port: int, gib: float) -> None:
    """One of the processes: does what is to be measured and prints figures as JSON."""
    import jax

    jax.config.update('jax_num_cpu_devices', DEVICES // processes)
    if processes > 1:
        jax.distributed.initialize(f'127.0.0.1:{port}', processes, rank, cluster_detection_method='deactivate')
    from mixcon_jax.runs.checkpoints import Checkpoints, Meta

    abstract = abstract_state(gib, axis=2 if what == 'restore on another axis' else 1)
    checkpoints = Checkpoints(folder)
    if what == 'save':
        state = jax.block_until_ready(made(abstract, 0))
    leaves = jax.tree.leaves(abstract)
    here = jax.local_device_count()
    own = sum(4 * here * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    Path('/proc/self/clear_refs').write_text('5')
    before = memory('VmRSS')
    if what == 'save':
        checkpoints.save(state, Meta(1, {}))
        checkpoints.wait()
    else:
        state = jax.block_until_ready(checkpoints.restore(abstract)[0])
    peak = memory('VmHWM')
    checkpoints.close()
    del state
    whole = sum(4 * x.size for x in leaves)
    print(json.dumps({'whole': whole, 'own': own, 'before': before, 'peak': peak}), flush=True)


def measure(what: str, folder: Path, processes: int, gib: float) -> list[dict[str, int]]:
    """The figures of every process."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'tests.benchmarks.checkpoint_memory', what, str(folder)]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    children = [
        subprocess.Popen(
            [*command, str(rank), str(processes), str(port), str(gib)], stdout=subprocess.PIPE, env=environment
        )
        for rank in range(processes)
    ]
    outputs = [child.communicate()[0] for child in children]
    assert not any(child.returncode for child in children), what
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main(gib: float = 3.0) -> None:
    print(
        f'Checkpoints of {1024 * gib:.0f} MiB: peak host memory above what was there, over the own part of each process'
    )
    for processes in (2, 1):
        with tempfile.TemporaryDirectory() as folder:
            for what in ('save', 'restore', 'restore on another axis'):
                for rank, each in enumerate(measure(what, Path(folder) / 'checkpoints', processes, gib)):
                    own, peak = each['own'], each['peak'] - each['before']
                    print(
                        f'{processes} x {DEVICES // processes} devices, process {rank}, {what:24}'
                        f' own {own / 2**20:5.0f} MiB, peak {peak / 2**20:5.0f}: {peak / own:.2f}'
                        f' (the whole state: {each["whole"] / own:.2f})',
                        flush=True,
                    )
                    # A save's copy, or the parts of a CPU's devices; and what is on its way: encoded, decoded, placed.
                    assert peak < own + SLACK, f'{what}: more than {SLACK >> 20} MiB beside the own part'


if __name__ == '__main__':
    if len(sys.argv) > 2:
        what, folder, *numbers, size = sys.argv[1:]
        member(what, folder, *map(int, numbers), float(size))
    else:
        main(*map(float, sys.argv[1:]))
