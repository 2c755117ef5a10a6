"""Checks and times the GPU kernels on a machine with an NVIDIA GPU: `python -m tests.gpu.on_device [SECTION ...]`.

Prints one table a section, and writes every figure to `--out FILE` (JSON). Sections: `correct` compares with float64 on
the same GPU, `scan` times the selective scan against its floors, XLA's chunked form and mamba_ssm if that is installed,
`split` slices of time, `layers` whole layers, `gain` and `conv` the other kernels. Times are those of calls queued one
behind the other.
"""

import argparse
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.selective_scan import mosaic_gpu, selective_scan
from kernels_pallas.selective_scan.mosaic_gpu.tuning import Settings

FIGURES: dict[str, Any] = {}
FAILED: list[str] = []


def milliseconds(function: Callable, *args: Any, seconds: float = 0.4) -> float:
    """Median time of a call, queued in batches so that the host does not count."""
    run = jax.jit(function)
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    once = max(time.perf_counter() - start, 1e-5)
    batch = max(1, int(seconds / 5 / once))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(batch):
            out = run(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / batch)
    return 1e3 * float(np.median(times))


def show(section: str, name: str, **figures: Any) -> None:
    FIGURES.setdefault(section, {}).setdefault(name, {}).update(figures)
    cells = '  '.join(
        f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}' for key, value in figures.items()
    )
    print(f'{section:8} {name:46} {cells}', flush=True)


def attempt(section: str, name: str, run: Callable[[], None]) -> None:
    """One case; an error becomes a line and the others go on."""
    try:
        run()
    except Exception as error:  # reported, and the exit code tells
        FAILED.append(f'{section} {name}')
        show(section, name, error=f'{type(error).__name__}: {str(error)[:300]}')


def draw(batch, length, channels, states, dtype=jnp.bfloat16, gate=True, softplus=True, resets=0.0, seed=0) -> dict:
    keys = iter(jax.random.split(jax.random.key(seed), 12))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    tokens = lambda: normal(batch, length, channels).astype(dtype)
    arrays = {'u': tokens(), 'dt': tokens() if softplus else jnp.abs(tokens()) * 0.3}
    arrays |= {
        'A': -jnp.broadcast_to(jnp.arange(1.0, states + 1), (channels, states))
        * jnp.exp(0.1 * normal(channels, states))
    }
    arrays |= {'B': normal(batch, length, states), 'C': normal(batch, length, states), 'D': normal(channels)}
    if softplus:
        arrays['dt_bias'] = normal(channels) - 4
    if gate:
        arrays['z'] = tokens()
    arrays['initial_state'] = normal(batch, channels, states)
    if resets:
        arrays['reset'] = jax.random.bernoulli(next(keys), resets, (batch, length))
    return arrays


def with_gradient(scan: Callable, softplus: bool) -> Callable:
    """Outputs and the gradient of every float array, for fixed cotangents."""

    def run(arrays, dy, dfinal):
        floats = {k: v for k, v in arrays.items() if k != 'reset'}
        function = lambda floats: scan(**floats, reset=arrays.get('reset'), dt_softplus=softplus)
        outputs, pull = jax.vjp(function, floats)
        return outputs, pull((dy.astype(outputs[0].dtype), dfinal.astype(outputs[1].dtype)))[0]

    return run


def correct() -> None:
    """Outputs and gradients against the associative scan in float64; the same bits twice."""
    single = {'dtype': jnp.float32}
    cases = [  # (B, T, D, N), how they are drawn, options of the call
        ((2, 300, 256, 16), {'resets': 0.02}, {}),
        ((2, 300, 256, 16), single | {'resets': 0.02}, {}),
        ((3, 257, 200, 8), single, {}),
        ((1, 1, 5, 3), single, {}),
        ((1, 65, 128, 64), single | {'resets': 0.05}, {}),
        ((1, 100, 384, 24), single | {'gate': False, 'softplus': False}, {}),
        ((1, 1000, 256, 16), single | {'resets': 0.01}, {'splits': 4}),
        ((2, 1000, 256, 16), single | {'resets': 0.01}, {'keep_every': 64}),
        ((2, 200, 256, 16), single | {'gate': False, 'resets': 0.01}, {'prior': True}),
        ((2, 200, 256, 16), single | {'resets': 0.01}, {'readout': True}),
        ((1, 70, 128, 64), {'resets': 0.05}, {}),
        ((2, 97, 128, 16), {'resets': 0.02}, {'keep_every': 96}),
        ((1, 640, 128, 16), single | {'resets': 0.01}, {'readout': True, 'splits': 2}),
        ((1, 640, 128, 16), single | {'gate': False}, {'prior': True, 'splits': 2}),
        ((4, 2048, 1024, 16), {'resets': 0.002}, {}),
    ]
    for shape, drawn, options in cases:
        extra = [
            str(value.__name__ if key == 'dtype' else f'{key}={value}') for key, value in (drawn | options).items()
        ]
        name = ' '.join(['x'.join(map(str, shape)), *extra])
        attempt('correct', name, functools.partial(_correct, name, shape, drawn, dict(options)))


def _correct(name: str, shape: tuple[int, ...], drawn: dict, options: dict) -> None:
    arrays = draw(*shape, **drawn)
    softplus = drawn.get('softplus', True)
    readout, prior = options.pop('readout', False), options.get('prior', False)
    if prior:
        arrays.pop('D')
    states = shape[3]
    if readout:
        arrays |= {'Z': 0.3 * jax.random.normal(jax.random.key(5), (states, states)), 'g': jnp.ones(states)}
    keys = jax.random.split(jax.random.key(9))
    dy = jax.random.normal(keys[0], arrays['u'].shape, arrays['u'].dtype)
    dfinal = jax.random.normal(keys[1], arrays['initial_state'].shape)
    run = jax.jit(with_gradient(functools.partial(mosaic_gpu.scan, **options), softplus))
    actual = run(arrays, dy, dfinal)
    again = run(arrays, dy, dfinal)
    same = all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(again)))

    def reference(Z=None, g=None, **arguments):
        out = selective_scan(
            **arguments, readout=None if Z is None else (Z, g, None), prior=prior, implementation='chunked_associative'
        )
        return (out[2], out[1]) if prior else out

    with jax.enable_x64(True):
        wide = lambda x: x if x.dtype == bool else jnp.asarray(np.asarray(x, np.float64))
        expected = jax.jit(with_gradient(reference, softplus))(*jax.tree.map(wide, (arrays, dy, dfinal)))
        expected = jax.tree.map(lambda x: np.asarray(x, np.float64), expected)
    errors = {}
    names = {'y': (actual[0][0], expected[0][0]), 'state': (actual[0][1], expected[0][1])}
    names |= {f'd{key}': (actual[1][key], expected[1][key]) for key in actual[1]}
    for key, (a, b) in names.items():
        a = np.asarray(a, np.float64)
        errors[key] = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    worst = max(errors, key=lambda key: errors[key] if np.isfinite(errors[key]) else np.inf)
    show('correct', name, worst=worst, relative=errors[worst], bits='same' if same else 'DIFFER')
    FIGURES['correct'][name]['errors'] = errors
    tolerance = 5e-3 if arrays['u'].dtype == jnp.bfloat16 else 2e-5
    wrong = [key for key, value in errors.items() if not value <= tolerance]
    if wrong or not same:
        raise AssertionError(f'{wrong} off by more than {tolerance}' if wrong else 'the same call gave other bits')


def ceilings() -> tuple[float, float]:
    """Measured bytes a second of a copy (read and written), and exponentials a second."""
    x = jnp.ones((1 << 28,), jnp.float32)
    copy = 2 * x.nbytes / (1e-3 * milliseconds(lambda x: x + 1.0, x))

    def many(x):
        for _ in range(32):
            x = jnp.exp2(x)
        return x

    small = jnp.full((1 << 24,), -0.5, jnp.float32)
    exponentials = 32 * small.size / (1e-3 * milliseconds(many, small))
    show('ceiling', 'copy, exp2', TB_s=copy / 1e12, T_exp_s=exponentials / 1e12)
    return copy, exponentials


def gradient_only(function: Callable) -> Callable:
    return lambda arrays, dy: jax.vjp(function, arrays)[1](dy)[0]


def scan(batch: int = 8, length: int = 4096, channels: int = 4096, states: int = 16) -> None:
    """Forward and forward + backward against the floors and XLA's chunked form."""
    bandwidth, exponentials = ceilings()
    updates, elements = batch * length * channels * states, batch * length * channels
    arrays = draw(batch, length, channels, states)
    arrays.pop('initial_state')
    dy = jax.random.normal(jax.random.key(1), arrays['u'].shape, jnp.bfloat16)
    floors = {'forward': (8 * elements / bandwidth, updates / exponentials)}
    floors['both'] = ((8 + 14) * elements / bandwidth, 3 * updates / exponentials)  # the state once more, and its decay
    for key, (by_bytes, by_exp) in floors.items():
        show('scan', f'floor of {key}', bytes_ms=1e3 * by_bytes, exp_ms=1e3 * by_exp)

    def times(name, run, backward=True):
        def both():
            forward = milliseconds(lambda a: run(**a)[0], arrays)
            figures = {'forward_ms': forward, 'of_floor': forward / (1e3 * max(floors['forward']))}
            if backward:
                total = milliseconds(gradient_only(lambda a: run(**a)[0]), arrays, dy)
                figures |= {'both_ms': total, 'both_of_floor': total / (1e3 * max(floors['both']))}
            show('scan', name, **figures)

        attempt('scan', name, both)

    kernel = functools.partial(mosaic_gpu.scan, dt_softplus=True)
    times('mosaic_gpu', kernel)
    times('mosaic_gpu, keep_every 64', functools.partial(kernel, keep_every=64))
    for tile, unroll in ((16, 1), (16, 2), (32, 1), (32, 4), (64, 2)):
        settings = Settings(tile, unroll, 16, 4)
        times(f'mosaic_gpu forward tile {tile} unroll {unroll}', functools.partial(kernel, settings=settings), False)
    for tile, stretch in ((8, 4), (16, 2), (32, 4)):
        settings = Settings(32, 2, tile, stretch)
        times(f'mosaic_gpu backward tile {tile} stretch {stretch}', functools.partial(kernel, settings=settings))
    reset = jax.random.bernoulli(jax.random.key(3), 1 / 512, (batch, length))
    times('mosaic_gpu + reset', functools.partial(kernel, reset=reset))
    readout = {'Z': 0.1 * jnp.eye(states), 'g': jnp.full(states, 1.2784645)}
    times('mosaic_gpu + readout', functools.partial(kernel, **readout))
    xla = functools.partial(selective_scan, dt_softplus=True, implementation='chunked')
    times('XLA chunked', xla)
    attempt('scan', 'mamba_ssm', functools.partial(_mamba_ssm, arrays, dy))


def _mamba_ssm(arrays: dict, dy: jax.Array) -> None:
    """The CUDA kernels of the mamba_ssm package on the same inputs, timed by CUDA events."""
    try:
        import torch
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        print(f'scan     mamba_ssm is not compared: {error}')
        return
    take = lambda x, dtype=torch.bfloat16: torch.tensor(np.asarray(x, np.float32), device='cuda', dtype=dtype)
    by_channel = lambda x: take(x).transpose(1, 2).contiguous().requires_grad_()
    u, dt, z, B, C = (by_channel(arrays[name]) for name in ('u', 'dt', 'z', 'B', 'C'))
    A, D, bias = (take(arrays[name], torch.float32).requires_grad_() for name in ('A', 'D', 'dt_bias'))
    gradient = take(dy).transpose(1, 2).contiguous()
    forward = lambda: selective_scan_fn(u, dt, A, B, C, D, z, bias, delta_softplus=True)

    def timed(run):
        for _ in range(3):
            run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 10

    with torch.no_grad():
        ms = timed(forward)
    show('scan', 'mamba_ssm', forward_ms=ms, both_ms=timed(lambda: forward().backward(gradient)))


def split(length: int = 65536, channels: int = 4096, states: int = 16) -> None:
    """One row: slices of time against none."""
    arrays = draw(1, length, channels, states)
    dy = jax.random.normal(jax.random.key(1), arrays['u'].shape, jnp.bfloat16)
    for splits in (1, 2, 4, 8, 16, 32, None):

        def run(splits=splits):
            function = functools.partial(mosaic_gpu.scan, dt_softplus=True, splits=splits)
            forward = milliseconds(lambda a: function(**a)[0], arrays)
            total = milliseconds(gradient_only(lambda a: function(**a)[0]), arrays, dy)
            show('split', f'B1 T{length} D{channels}, {splits or "chosen"} slices', forward_ms=forward, both_ms=total)

        attempt('split', str(splits), run)


def layers(batch: int = 8, length: int = 4096, dim: int = 2048) -> None:
    """A whole layer, forward and backward in bfloat16, by mixer and implementation of the scan."""
    from flax import nnx

    from mixcon_jax.config import default
    from mixcon_jax.models.context import Context
    from mixcon_jax.models.layers import Parameters
    from mixcon_jax.models.mixers import MIXERS
    from mixcon_jax.models.presets import conba

    for mixer, preset, implementation in (
        ('mamba', 'conba', 'mosaic_gpu'),
        ('mamba', 'conba', 'chunked'),
        ('conba', 'conba', 'mosaic_gpu'),
        ('conba', 'conba', 'chunked'),
        ('conba', 'conba_paper', 'mosaic_gpu'),
    ):

        def run(mixer=mixer, preset=preset, implementation=implementation):
            config = default().model
            config.dim, config.dtype = dim, 'bfloat16'
            config.conba.update(conba(preset))
            config.ssm.implementation = implementation
            layer = MIXERS[mixer](config, Parameters(jax.random.key(0)), 8)
            graph, state = nnx.split(layer)
            x = jax.random.normal(jax.random.key(1), (batch, length, dim), jnp.bfloat16)
            context = Context.whole(batch, length)

            def loss(state, x):
                return jnp.sum(nnx.merge(graph, state)(x, context, None)[0].astype(jnp.float32))

            ms = milliseconds(lambda s, x: jax.grad(loss, argnums=(0, 1))(s, x), state, x)
            show(
                'layers',
                f'{mixer} {preset if mixer == "conba" else ""} {implementation}',
                both_ms=ms,
                Mtok_s=batch * length / ms / 1e3,
            )

        attempt('layers', f'{mixer} {preset} {implementation}', run)


def _benchmark(name: str) -> None:
    attempt(name, 'benchmark', importlib.import_module(f'tests.benchmarks.{name}').main)


SECTIONS = {
    'correct': correct,
    'scan': scan,
    'split': split,
    'layers': layers,
    'gain': functools.partial(_benchmark, 'adaptive_gain'),
    'conv': functools.partial(_benchmark, 'causal_conv1d'),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sections', nargs='*', choices=[*SECTIONS, []], help='all, when none is named')
    parser.add_argument('--out', help='JSON file for every figure')
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    if device.platform not in ('gpu', 'cuda'):
        print(f'error: JAX sees no GPU here, only {device.platform}', file=sys.stderr)
        return 2
    print(f'{device.device_kind}, compute capability {device.compute_capability}, JAX {jax.__version__}', flush=True)
    FIGURES['device'] = device.device_kind
    for name in options.sections or SECTIONS:
        start = time.perf_counter()
        SECTIONS[name]()
        print(f'({name}: {time.perf_counter() - start:.0f} s)', flush=True)
        if options.out:
            with open(options.out, 'w') as file:
                json.dump(FIGURES, file, indent=1)
    if FAILED:
        print(f'error: {len(FAILED)} failed: {", ".join(FAILED)}', file=sys.stderr)
    return len(FAILED) > 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
