"""The process that compiles: reads a job and its parent from stdin, writes what it found, a JSON line at a time.

A line after the layout, one after each variant; the variants are compiled side by side.
"""

import json
import math
import os
import resource
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from kernels_pallas import cards, cases
from mixcon_jax import config as configs
from mixcon_jax.host.signals import end_with
from mixcon_jax.models import accounting
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.parallel.placement import placement
from mixcon_jax.planner import programs
from mixcon_jax.planning import collectives, hlo, memory, resources
from mixcon_jax.planning.compiling import devices
from mixcon_jax.planning.estimate import estimate, gpu_kernel
from mixcon_jax.planning.hardware import TARGETS
from mixcon_jax.step import make_steps

PRODUCTS = {'triton': True, 'cublas': False}  # xla_gpu_enable_triton_gemm
REPLICATED = 64 * 2**20  # bytes of an array on every device that are warned of one by one
WITHOUT_TIMING = {'xla_gpu_autotune_level': 0}  # there is no device to time candidates on
BY_BYTES = ('selective_scan', 'adaptive_gain', 'causal_conv1d')  # kernels whose time goes with their bytes at any shape


def main() -> None:
    """Compiles the job on stdin."""
    job = json.load(sys.stdin)
    end_with(job.pop('parent'))  # it would go on for minutes, for nobody
    answers, lock = os.fdopen(os.dup(1), 'w', encoding='utf-8'), threading.Lock()
    os.dup2(2, 1)  # what compilers print goes where they warn

    def say(record: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(record), file=answers, flush=True)

    plan(configs.from_dict(job.pop('config')), say=say, **job)


def plan(
    config: ml_collections.ConfigDict,
    *,
    target: str,
    hosts: int,
    per_host: int,
    what: str,
    batch: int,
    context: int,
    products: list[str],
    say: Callable[[dict[str, Any]], None],
) -> None:
    """Says the layout and the counts of every variant; see `mixcon_jax.planner.plan.plan` for the arguments."""
    if what != 'train':
        config = programs.without_drops(config)
    found = devices(target, hosts, per_host)
    mesh = make_mesh(config.mesh, found)
    with jax.default_device(found[0]), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        start = time.perf_counter()
        steps = make_steps(config, mesh)
        with resources.laid_out() as shared:
            if what == 'train':
                lowered = programs.train_step(config, steps)
            else:
                lowered = programs.generation(config, steps, what, batch, context)
        state = steps.abstract_state
        fixed = {
            'mesh': dict(mesh.shape),
            'model': counts(config, what, batch, context),
            'parameters': programs.shard_bytes(state.params),
            'gradients': programs.shard_bytes(state.params) if what == 'train' else 0,
            'moments': programs.shard_bytes(state.opt_state) if what == 'train' else 0,
            'state': 0
            if what == 'train'
            else programs.shard_bytes(programs.decode_state(config, steps, batch, context)),
            'layout': placement(state.params, steps.logical_axes, mesh),
            'replicated': programs.replicated(steps, REPLICATED),
            'passed_over': sorted({str(one.message) for one in said if ' in place of ' in str(one.message)}),
            'shared_bytes': shared,
            'traced': time.perf_counter() - start,
        }
        say(fixed)
        capability = TARGETS[target].capability
        rounds, rates = programs.unknown_rounds(config, mesh, what, batch, context), measured(capability[0])

    def compile_with(name: str) -> None:
        start = time.perf_counter()
        options = WITHOUT_TIMING | {'xla_gpu_enable_triton_gemm': PRODUCTS[name]}
        with jax.default_device(found[0]):
            compiled = lowered.compile(compiler_options=options)
        assert type(compiled.runtime_executable()).__name__ == 'Executable', 'compiled for the CPU'
        seconds = time.perf_counter() - start
        say({name: variant(config, compiled, mesh, target, fixed, rounds, rates) | {'compiled': seconds}})

    with ThreadPoolExecutor(len(products)) as pool:
        list(pool.map(compile_with, products))
    say({'compiler_memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10})


def counts(config: ml_collections.ConfigDict, what: str, batch: int, context: int) -> dict[str, Any]:
    """Parameters and operations of the whole model, by hand of `models.accounting`."""
    total = accounting.parameter_count(config.model)
    parts: dict[str, int] = {}
    for path, shape, _ in accounting.parameters(config.model):
        key = path.split('/')[3] if path.startswith('blocks/') and path.count('/') > 3 else path.split('/')[0]
        parts[key] = parts.get(key, 0) + math.prod(shape)
    rows, new, length = {
        'train': (config.train.batch_size, config.data.seq_len, config.data.seq_len),
        'prefill': (batch, context, context),
        'decode': (batch, 1, 2 * context),  # of which a causal token sees half in the mean
    }[what]
    tokens, vocabulary = rows * new, config.model.vocab_size
    flops = accounting.flops_per_token(config.model, length) * tokens
    exponentials = sum(accounting.exponentials_per_token(config.model, length)[: 2 if what == 'train' else 1]) * tokens
    if what != 'train':  # logits of a row's last token alone, and no loss
        flops = flops / 3 - 2 * config.model.dim * vocabulary * (tokens - rows)
        exponentials -= vocabulary * tokens
    return {
        'total': total.total, 'active': total.active, 'embedding': total.embedding, 'by_part': parts,
        'tokens': tokens, 'flops_per_token': flops / tokens, 'flops': flops,
        'exponentials': exponentials,
        'state_bytes': accounting.state_bytes(config.model, context, batch) if what != 'train' else 0,
    }  # fmt: skip


def variant(
    config: Any,
    compiled: Any,
    mesh: Mesh,
    target: str,
    fixed: Mapping[str, Any],
    rounds: hlo.Rounds,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """What one compiled module says of itself."""
    text, stats = compiled.as_text(), compiled.memory_analysis()
    module = hlo.parse(text)
    found = hlo.kernels(module, rounds)
    exchanged = collectives.exchanges(found, mesh.shape, [device.process_index for device in mesh.devices.flat])
    number = mesh.size
    kept = memory.kept_by_loops(module, config.model.num_blocks)
    model, device = fixed['model'], TARGETS[target]
    return {
        'peak': stats.peak_memory_in_bytes,
        'arguments': stats.argument_size_in_bytes,
        'activations': kept,
        'temporaries': max(0, stats.peak_memory_in_bytes - stats.argument_size_in_bytes - fixed['gradients'] - kept),
        'largest': [vars(one) for one in memory.largest_arrays(text, module)],
        'largest_elements': hlo.largest(text),
        'exchanges': [vars(one) for one in exchanged],
        'instructions': sum(map(len, module[0].values())),
        **hlo.totals(found),
        'gpu_kernels': sorted({name for name in map(gpu_kernel, found) if name}),
        'estimate': estimate(
            found, exchanged, device, flops=model['flops'] / number, exponentials=model['exponentials'] / number,
            measured=rates,
        ),
    }  # fmt: skip


def measured(major: int) -> dict[str, float]:
    """Bytes a second that GPUs of this generation have moved in a call and its gradient, by kernel: cards' median."""
    found = {}
    for kernel in BY_BYTES:
        moved = {case.name: case.both_bytes for case in cases.of(kernel)[1]}
        rates = [
            moved[name] / (1e-3 * times['both'])
            for card in cards.shipped(kernel)
            if card.major == major and card.counts
            for name, times in card.times.items()
            if name in moved
        ]
        if rates:
            found[kernel] = statistics.median(rates)
    return found


if __name__ == '__main__':
    main()
