"""What a whole train step launches and moves on a GPU, counted from the module compiled for an H100 that is not there.

    python -m tests.benchmarks.compiled_step                                     # the ladder's models
    python -m tests.benchmarks.compiled_step 'dense 856M' --variant model.remat=selective --variant model.remat=block
    python -m tests.benchmarks.compiled_step 'dense 856M' --gpus 8 --variant mesh.fsdp=8

Nothing runs, and a count is no speed. Each rung is compiled in a process of its own, since a compiler that aborts takes
its process along, as it is and once for each `--variant`: options to set, `KEY=VALUE` with spaces between.
JAX_PLATFORMS=cpu, extra `plan`.

The columns: memory at the peak; kernels launched; conditions of loops whose rounds depend on data, each of which the
host waits for; GiB read and written by kernels, and of those in float32; the necessary GiB and the ratio; operations in
matrix products as a multiple of the model's own (models/accounting); exchanges with other GPUs and the GiB sent, by
rings; CPU seconds to trace and to compile, all threads together. Of a loop of unknown rounds `--rounds` are counted: by
default as many as `planner.programs.unknown_rounds` says, of attention and of the experts' portable products.

Of several GPUs, each with as many rows as a rung has, all figures are one's. They are data parallel unless a variant
arranges them otherwise. Where it splits the inside of layers, the necessary counts what that leaves whole as split.

Necessary are, of P parameters with AdamW, 32 P bytes (the gradient written; parameter, gradient and both moments read;
parameter and moments written, all float32) and twice the bytes of what the backward pass keeps with
`model.remat='selective'` (written and read once). Compute-type copies of the weights and what lives only inside a layer
count nothing: no program moves as little.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

GIB = 2**30
TIMEOUT = 1200  # seconds a compile
PRODUCTS = ('triton', 'cublas')
MODELS = ('dense 75M', 'dense 856M', 'Mamba', '2:6 Conba', '2:6 Conba, 8 experts')


def configuration(name: str, options: Sequence[str] = (), tiny: bool = False, gpus: int = 1) -> Any:
    """A rung's configuration, resolved, with options set, `key=value`, and as many rows for each of several GPUs."""
    from mixcon_jax import config as configs
    from tests.benchmarks.ladder import RUNGS, shrunk

    config = shrunk(RUNGS[name]()) if tiny else RUNGS[name]()
    for option in options:
        key, _, value = option.partition('=')
        try:
            configs.put(config, key, ast.literal_eval(value))
        except (ValueError, SyntaxError):  # a word
            configs.put(config, key, value)
    config.train.batch_size *= gpus
    return configs.validate(config, gpus)


def figures(config: Any, target: str, rounds: float = 0, products: str = PRODUCTS[0], gpus: int = 1) -> dict[str, Any]:
    """The counts of a configuration's train step, on one device of however many.

    Args:
      config: resolved.
      target: of `planning.hardware.TARGETS`.
      rounds: of every loop whose number is not known; 0 takes those of `programs.unknown_rounds`.
      products: what computes matrix products, of `PRODUCTS`: a GPU that is there would choose one by one.
      gpus: of one host, arranged by `config.mesh`.
    """
    import jax

    from mixcon_jax.models.accounting import flops_per_token, parameter_count
    from mixcon_jax.parallel.mesh import make_mesh
    from mixcon_jax.planner import programs
    from mixcon_jax.planning import collectives, hlo
    from mixcon_jax.planning.compiling import devices
    from mixcon_jax.step import make_steps

    device, *others = devices(target, devices_per_host=gpus)
    length, rows = config.data.seq_len, config.train.batch_size // gpus
    with jax.default_device(device):  # kernels ask for its architecture
        steps = make_steps(config, make_mesh(config.mesh, [device, *others]))
        counted = rounds or programs.unknown_rounds(config, steps.mesh)
        start = time.process_time()
        lowered = programs.train_step(config, steps)
        traced = time.process_time()
        compiled = lowered.compile(compiler_options={'xla_gpu_enable_triton_gemm': products == 'triton'})
    assert type(compiled.runtime_executable()).__name__ == 'Executable', 'compiled for the CPU'
    seconds = traced - start, time.process_time() - traced
    module = hlo.parse(compiled.as_text())
    loops = [loop for loop in hlo.loops(module, counted) if loop.rounds is None]
    by_name: dict[str, int] = {}
    for loop in loops:
        by_name[loop.operation] = by_name.get(loop.operation, 0) + loop.entered
    kept, kernels = kept_bytes(config, rows // config.train.accum_steps, device), hlo.kernels(module, counted)
    exchanges = collectives.exchanges(kernels, steps.mesh.shape, [0] * gpus)
    own = programs.shard_bytes(steps.abstract_state.params)
    return {
        'parameters': parameter_count(config.model).total,
        'peak': compiled.memory_analysis().peak_memory_in_bytes,
        **hlo.totals(kernels),
        'exchanges': sum(exchange.count for exchange in exchanges),
        'sent': sum(exchange.sent for exchange in exchanges),
        'conditions': round(sum(loop.entered * (loop.counted + 1) for loop in loops)),
        'unknown': by_name,
        'necessary': 8 * own + 2 * kept * config.train.accum_steps,
        'kept': kept,
        'flops_of_model': flops_per_token(config.model, length) * rows * length,
        'traced': seconds[0],
        'compiled': seconds[1],
    }


def kept_bytes(config: Any, rows: int, device: Any) -> int:
    """Bytes that the backward pass of a microbatch of so many rows keeps when remat is selective, but for weights."""
    import jax
    from flax import nnx

    from mixcon_jax.models.context import Context
    from mixcon_jax.models.decoder import abstract

    config = config.copy_and_resolve_references()
    config.model.remat = 'selective'
    graphdef, params, rest = nnx.split(abstract(config.model), nnx.Param, ...)
    tokens = jax.ShapeDtypeStruct((rows, config.data.seq_len), 'int32')

    def pullback(params: Any, rest: Any, tokens: Any) -> Any:
        context = Context(tokens, tokens, rng=jax.random.key(0), train=True)
        return jax.vjp(lambda params: nnx.merge(graphdef, params, rest)(tokens, context)[0], params)[1]

    with jax.default_device(device):
        residuals = jax.tree.leaves(jax.eval_shape(pullback, params, rest, tokens))
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals if leaf.shape not in weights)


def in_a_process(
    name: str,
    options: Sequence[str],
    target: str,
    rounds: float = 0,
    products: str = PRODUCTS[0],
    tiny: bool = False,
    gpus: int = 1,
) -> dict[str, Any]:
    """`figures` of a rung, from a process of its own, or ``{'error': its last lines}``."""
    command = [sys.executable, '-m', 'tests.benchmarks.compiled_step', '--one', name, '--target', target]
    command += ['--rounds', str(rounds), '--products', products, '--gpus', str(gpus), *(['--tiny'] if tiny else [])]
    command += [argument for option in options for argument in ('--variant', option)]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'MIXCON_TRUST_UNVERIFIED': '1'}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {'error': f'not compiled in {TIMEOUT} s'}
    if done.returncode:
        return {'error': f'exit code {done.returncode}: ' + '\n'.join(done.stderr.splitlines()[-5:])}
    return json.loads(done.stdout.splitlines()[-1])


HEADER = (
    f'{"rung":44}{"peak GiB":>9}{"kernels":>9}{"waits":>7}{"GiB":>8}{"float32":>9}{"necessary":>11}{"ratio":>7}'
    f'{"products":>10}{"exchanges":>11}{"GiB sent":>10}{"trace s":>9}{"compile s":>11}'
)


def line(name: str, found: dict[str, Any]) -> str:
    """A rung in one line of the table."""
    if 'error' in found:
        return f'{name:44} {found["error"]}'
    return (
        f'{name:44}{found["peak"] / GIB:9.2f}{found["kernels"]:9,}{found["conditions"]:7,}{found["bytes"] / GIB:8.1f}'
        f'{found["float32"] / GIB:9.1f}{found["necessary"] / GIB:11.1f}{found["bytes"] / found["necessary"]:7.1f}'
        f'{found["flops"] / found["flops_of_model"]:10.2f}{found["exchanges"]:11,}{found["sent"] / GIB:10.2f}'
        f'{found["traced"]:9.1f}{found["compiled"]:11.1f}'
    )


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rungs', nargs='*', metavar='RUNG', help=f'of the ladder; by default {", ".join(MODELS)}')
    parser.add_argument('--variant', action='append', default=[], metavar='KEY=VALUE ...', help='options to set')
    parser.add_argument('--target', default='h100')
    parser.add_argument('--rounds', type=float, default=0, help='of loops whose number of rounds is not known')
    parser.add_argument('--products', choices=PRODUCTS, default=PRODUCTS[0], help='what computes matrix products')
    parser.add_argument(
        '--gpus', type=int, default=1, help="of one host, each with the rung's rows; --variant mesh.fsdp=8"
    )
    parser.add_argument('--tiny', action='store_true', help='small sizes, to try the script')
    parser.add_argument('--json', action='store_true', help='every figure, as JSON')
    parser.add_argument('--one', metavar='RUNG', help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args(arguments)
    if args.one:
        config = configuration(args.one, args.variant, args.tiny, args.gpus)
        print(json.dumps(figures(config, args.target, args.rounds, args.products, args.gpus)))
        return
    from tests.benchmarks.ladder import RUNGS

    if unknown := [name for name in args.rungs if name not in RUNGS]:
        parser.error(f'no rung {unknown[0]!r}; there are {", ".join(RUNGS)}')
    if not args.json:
        number = 'an' if args.gpus == 1 else f'each of {args.gpus}'
        print(f'compiled for {number} absent {args.target}\n{HEADER}', flush=True)
    settings = args.target, args.rounds, args.products, args.tiny, args.gpus
    for name in args.rungs or MODELS:
        for variant in ['', *args.variant]:
            found = in_a_process(name, variant.split(), *settings)
            title = f'{name}: {variant}' if variant else name
            print(json.dumps({title: found}) if args.json else line(title, found), flush=True)
            if not args.json:
                for operation, entered in found.get('unknown', {}).items():
                    print(f'  {entered:7,} times a loop of unknown rounds: ...{operation[-80:]}', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
