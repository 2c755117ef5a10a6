"""Compile time of the train step at 2 and at 16 blocks: blocks are scanned, so depth must cost next to nothing.

    python -m tests.benchmarks compile_time

Every figure is the fastest of three compilations, without a cache, taking turns between depths.
"""

import time

import jax

from mixcon_jax import config as configs
from mixcon_jax import sharding, step

LIMIT = 1.3  # times the compile time of 2 blocks
REPEATS = 3


def lowered(num_blocks: int) -> jax.stages.Lowered:
    """The train step of a MixCon block, conba, attention and experts, before compilation."""
    config = configs.default()
    config.model.update(num_blocks=num_blocks, pattern=('conba+mlp', 'attention+moe'))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    steps = step.make_steps(config, mesh)
    shape = (config.train.batch_size, config.data.seq_len)
    types = {'tokens': 'int32', 'targets': 'int32', 'loss_mask': 'bool', 'segment_ids': 'int32', 'positions': 'int32'}
    batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, dtype in types.items()}
    return steps.train_step.lower(steps.abstract_state, batch)


def main() -> None:
    """Prints tracing and compile times and asserts the limit."""
    jax.config.update('jax_enable_compilation_cache', False)
    depths = (2, 16)
    tracing, compiling = {}, {depth: [] for depth in depths}
    programs = {}
    for depth in depths:
        start = time.perf_counter()
        programs[depth] = lowered(depth)
        tracing[depth] = time.perf_counter() - start
    for _ in range(REPEATS):
        for depth in depths:
            start = time.perf_counter()
            programs[depth].compile()
            compiling[depth].append(time.perf_counter() - start)
    print(f'{"blocks":>8}{"trace s":>10}{"compile s":>11}{"lines of StableHLO":>20}')
    for depth in depths:
        lines = len(programs[depth].as_text().splitlines())
        print(f'{depth:8}{tracing[depth]:10.1f}{min(compiling[depth]):11.1f}{lines:20}')
    ratio = min(compiling[16]) / min(compiling[2])
    print(f'compile time at 16 blocks: {ratio:.2f} times that at 2 (at most {LIMIT})')
    assert ratio <= LIMIT


if __name__ == '__main__':
    main()
