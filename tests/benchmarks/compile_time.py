"""Compile time of the train step at 2 and at 16 blocks: blocks are scanned, so depth must cost next to nothing.

    python -m tests.benchmarks compile_time

Every figure is the fastest of several fresh compilations, with every cache off, taking turns between the depths. The
limit is on CPU seconds, all of the compiler's threads together: other work on the machine stretches the wall time,
which is printed beside them, by more than the limit allows.
"""

import time

import jax

from mixcon_jax import config as configs
from mixcon_jax import step
from mixcon_jax.parallel.mesh import make_mesh

LIMIT = 1.3  # times the compile time of 2 blocks
DEPTHS = (2, 16)
REPEATS = 3


def lowered(num_blocks: int) -> jax.stages.Lowered:
    """The train step of a MixCon block, conba, attention and experts, before compilation."""
    config = configs.default()
    config.model.update(num_blocks=num_blocks, pattern=('conba+mlp', 'attention+moe'))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    steps = step.make_steps(config, mesh)
    shape = (config.train.batch_size, config.data.seq_len)
    batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, dtype in step.BATCH.items()}
    return steps.train_step.lower(steps.abstract_state, batch)


def main() -> None:
    """Prints tracing and compile times and asserts the limit."""
    jax.config.update('jax_enable_compilation_cache', False)
    tracing: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    wall: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    cpu: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    lines = {}
    for _ in range(REPEATS):
        for depth in DEPTHS:
            jax.clear_caches()  # a program that is compiled again in one process comes from memory
            start = time.perf_counter()
            program = lowered(depth)
            tracing[depth].append(time.perf_counter() - start)
            start, used = time.perf_counter(), time.process_time()
            program.compile()
            wall[depth].append(time.perf_counter() - start)
            cpu[depth].append(time.process_time() - used)
            lines[depth] = len(program.as_text().splitlines())
    assert min(min(times) for times in cpu.values()) > 0.5, 'this was no compilation'
    print(f'{"blocks":>8}{"trace s":>10}{"compile s":>11}{"CPU s":>9}{"lines of StableHLO":>20}')
    for depth in DEPTHS:
        times = f'{min(tracing[depth]):10.1f}{min(wall[depth]):11.1f}{min(cpu[depth]):9.1f}'
        print(f'{depth:8}{times}{lines[depth]:20}')
    shallow, deep = DEPTHS
    ratio, wall_ratio = (min(times[deep]) / min(times[shallow]) for times in (cpu, wall))
    print(f'compiling {deep} blocks: {ratio:.2f} times the CPU seconds of {shallow} (at most {LIMIT}),')
    print(f'  {wall_ratio:.2f} times the wall time')
    assert ratio <= LIMIT


if __name__ == '__main__':
    main()
