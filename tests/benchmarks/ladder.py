"""Whole train steps of the sizes that people compare: `python -m tests.benchmarks.ladder [RUNG ...]`, on one GPU.

A rung is a model and a batch. It prints tokens a second, MFU by the model's own operations, memory at the peak and how
much of the time the GPU was busy; `--json` also the kernels that took most of a step. `--tiny` shrinks every rung, to
try the script.
"""

import argparse
import json
import pathlib
import runpy
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from mixcon_jax import config as configs
from mixcon_jax.host.log_filters import shorten_jax
from mixcon_jax.models.accounting import flops_per_token, parameter_count
from mixcon_jax.models.presets import conba, hybrid
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.planning.hardware import peak_flops
from mixcon_jax.step import BATCH, make_steps

ROOT = pathlib.Path(__file__).resolve().parents[2]


def dense(layers: int, dim: int, heads: int, kv_heads: int, hidden: int, tied: bool, batch: int, length: int):
    """A Llama: RoPE attention and SwiGLU in every layer, each a block, so that the optimizer has few arrays."""
    config = configs.default()
    model = config.model
    model.update(vocab_size=32768, dim=dim, num_blocks=layers, tie_embeddings=tied, dtype='bfloat16')
    model.pattern = hybrid(1, 0)
    model.attention.update(num_heads=heads, num_kv_heads=kv_heads, rope=True)
    model.mlp.hidden_dim = hidden
    config.data.seq_len, config.train.batch_size = length, batch
    config.train.loss_chunk = batch * length // 4
    return config


def at_75m(pattern: tuple[str, ...], preset: str = 'conba') -> ml_collections.ConfigDict:
    """The 75M model with other layers."""
    config = dense(1, 768, 12, 3, 2048, True, 16, 2048)
    config.model.pattern = pattern
    config.model.attention.rope = False
    config.model.conba.update(conba(preset))
    return config


def experiment(name: str, rows: int) -> ml_collections.ConfigDict:
    """A file of experiments/mixcon on one device, at a batch of so many rows, all at once."""
    config = runpy.run_path(str(ROOT / 'experiments' / 'mixcon' / f'{name}.py'))['get_config']()
    config.train.batch_size, config.train.accum_steps, config.mesh.fsdp = rows, 1, 1
    return config


def changed(rung: Callable[[], ml_collections.ConfigDict], deterministic: bool, embedding_gradient: str):
    """A rung with XLA free to choose its products by timing them, or not, and a gradient of the embedding."""

    def made() -> ml_collections.ConfigDict:
        config = rung()
        config.train.deterministic, config.model.embedding_gradient = deterministic, embedding_gradient
        return config

    return made


RUNGS: dict[str, Callable[[], ml_collections.ConfigDict]] = {
    'dense 75M': lambda: dense(8, 768, 12, 3, 2048, True, 16, 2048),
    'Mamba': lambda: at_75m(hybrid(0, 8, mixer='mamba')),
    '2:6 Conba': lambda: at_75m(hybrid(2, 6)),
    '2:6 Mamba': lambda: at_75m(hybrid(2, 6, mixer='mamba')),
    '2:6 Conba, 8 experts': lambda: experiment('130m', 16),
    '2:6 conba_paper': lambda: at_75m(hybrid(2, 6), 'conba_paper'),
    'dense 856M': lambda: dense(16, 2048, 16, 4, 5632, False, 4, 4096),
    'Mamba-2': lambda: at_75m(hybrid(0, 8, mixer='mamba2')),
    'RetNet': lambda: at_75m(hybrid(0, 8, mixer='retnet')),
    'GLA': lambda: at_75m(hybrid(0, 8, mixer='gla')),
    'RWKV-4': lambda: at_75m(('rwkv4+rwkv_channel_mix',) * 8),
    '1.3B, 8 experts': lambda: experiment('1_3b', 8),
}
# What orders of sums cost: `free` is without train.deterministic, `scatter` with XLA's gradient of the embedding.
PLAIN = tuple(RUNGS)
RUNGS |= {f'{name}, free': changed(rung, False, 'auto') for name, rung in RUNGS.items()} | {
    f'{name}, scatter': changed(rung, True, 'scatter') for name, rung in RUNGS.items()
}


def shrunk(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same layers, small enough for a CPU to compile and run in seconds: two of them."""
    model = config.model
    model.update(dim=64, vocab_size=128, num_blocks=1, pattern=(model.pattern * 4)[2:4])
    model.attention.update(num_heads=2, num_kv_heads=1)
    model.ssm.d_state, model.mlp.hidden_dim, model.moe.hidden_dim = 4, 64, 32
    config.data.seq_len, config.train.batch_size, config.train.loss_chunk = 32, 2, 64
    return config


def packed_batch(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """Random tokens in documents of about a third of a row."""
    rng = np.random.default_rng(0)
    shape = _, length = config.train.batch_size, config.data.seq_len
    tokens = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    starts = rng.random(shape) < 3 / length
    starts[:, 0] = True
    index = np.broadcast_to(np.arange(length), shape)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    values = tokens, np.roll(tokens, -1, 1), np.ones(shape, bool), np.cumsum(starts, 1), positions
    return {key: np.asarray(x, dtype) for (key, dtype), x in zip(BATCH.items(), values)}


def measure(name: str, tiny: bool, compiled: Callable[[float], None] = lambda seconds: None) -> dict[str, Any]:
    """Times a rung on the first device.

    Args:
      name: of `RUNGS`.
      tiny: shrink it.
      compiled: called with the seconds it took, between compiling and running.
    """
    config = configs.validate(shrunk(RUNGS[name]()) if tiny else RUNGS[name]())
    device = jax.devices()[0]
    steps = make_steps(config, make_mesh(config.mesh, [device]))
    start = time.perf_counter()
    batch = steps.put(packed_batch(config))
    step = steps.train_step.lower(steps.abstract_state, batch).compile()
    init_state = steps.init_state.lower().compile()
    seconds = time.perf_counter() - start
    compiled(seconds)
    state = init_state()
    tokens = config.train.batch_size * config.data.seq_len
    state, metrics = step(state, batch)
    first = float(metrics['loss'])
    begin = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    once = max(time.perf_counter() - begin, 1e-4)
    count = max(2, min(30, int((0.1 if tiny else 2) / once)))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch)
        loss = float(metrics['loss'])
        times.append((time.perf_counter() - begin) / count)
    rate = tokens / float(np.median(times))
    peak, flops = peak_flops(device.device_kind), flops_per_token(config.model, config.data.seq_len)
    stats = device.memory_stats() or {}
    state, profile = profiled(step, state, batch)
    return {
        'parameters': parameter_count(config.model).total,
        'compile_seconds': round(seconds, 1),
        'step_ms': round(1e3 * tokens / rate, 2),
        'tokens_per_second': round(rate),
        'mfu': round(rate * flops / peak, 4) if peak else None,
        'peak_gib': round(stats['peak_bytes_in_use'] / 2**30, 2) if 'peak_bytes_in_use' in stats else None,
        'loss': [first, loss],
        'finite': bool(np.isfinite(loss)),
    } | profile


def profiled(step: Callable, state: Any, batch: Any, count: int = 3) -> tuple[Any, dict[str, Any]]:
    """The state after `count` more steps, the GPU's busy share of them, and what takes most of a step, in ms."""
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        jax.profiler.stop_trace()
        (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
        spans, by_kernel = kernel_spans(path)
    if not spans:
        return state, {'busy': None, 'kernels': {}}
    spans.sort()
    busy, end = 0.0, spans[0][0]
    for begin, finish in spans:
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    most = sorted(by_kernel.items(), key=lambda item: -item[1])[:60]
    return state, {
        'busy': round(busy / (end - spans[0][0]), 4),
        'busy_ms': round(busy / 1e6 / count, 2),
        'launches': round(len(spans) / count),
        'kernels': {name[:90]: round(nanoseconds / 1e6 / count, 3) for name, nanoseconds in most},
    }


def kernel_spans(path: pathlib.Path) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Begin and end of every kernel in a profile, in ns, and the sums by name."""
    spans, by_kernel = [], defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith('/device:GPU'):
            continue
        for line in plane.lines:
            if not line.name.startswith('Stream'):
                continue  # what XLA derives from them
            for event in line.events:
                spans.append((event.start_ns, event.start_ns + event.duration_ns))
                by_kernel[event.name] += event.duration_ns
    return spans, by_kernel


def line(name: str, found: dict[str, Any]) -> str:
    """A rung in one line."""
    shown = lambda key, scale, unit: '–' if found.get(key) is None else f'{scale * found[key]:.1f}{unit}'
    speed = f'{found["tokens_per_second"]:9,} tok/s  MFU {shown("mfu", 100, " %"):>7}'
    load = f'busy {shown("busy", 100, " %"):>7}  peak {shown("peak_gib", 1, " GiB"):>9}'
    step = f'step {found["step_ms"]:8.1f} ms  compiled in {found["compile_seconds"]:.0f} s'
    return f'{name:22}{found["parameters"] / 1e6:7.1f}M {speed}  {load}  {step}'


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rungs', nargs='*', metavar='RUNG', help=f'{", ".join(PLAIN)}; these by default')
    parser.add_argument('--tiny', action='store_true', help='small sizes, to try the script')
    parser.add_argument('--json', action='store_true', help='every figure, as JSON')
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.rungs if name not in RUNGS]:
        parser.error(f'no rung {unknown[0]!r}; there are {", ".join(PLAIN)}, each also with ", free" or ", scatter"')
    shorten_jax()
    for name in options.rungs or PLAIN:
        found = measure(name, options.tiny)
        print(json.dumps({name: found}) if options.json else line(name, found), flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
