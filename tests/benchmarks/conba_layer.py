"""A Conba layer against a Mamba layer, forward and backward: `python -m tests.benchmarks.conba_layer`.

The Mamba layer's time beside its own scan's shows how much of a layer the scan is.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.selective_scan import selective_scan
from mixcon_jax import config as configs
from mixcon_jax.models import kinds, presets
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters
from tests.benchmarks.timing import compare, table

BASELINE = 'mamba layer'
TARGETS = {'conba layer, diagonal gain': 1.6, 'conba layer, matrix gain': 2.5}

CASES = {
    BASELINE: ('mamba', {}),
    'conba layer, no gain': ('conba', {'control': 'none'}),
    'conba layer, diagonal gain': ('conba', {'control': 'diag'}),
    'conba layer, matrix gain': ('conba', {}),
    'conba_paper layer': ('conba', presets.conba('conba_paper')),
    'conba_code layer': ('conba', presets.conba('conba_code')),
}


def layer_gradient(mixer: str, options: dict, dim: int, batch: int, length: int) -> tuple[Callable, tuple]:
    """Returns value-and-gradient of a layer for its parameters and input, and its arguments; options are Conba's."""
    config = configs.default()
    config.model.dim = dim
    config.model.conba.update(options)
    config.model.hyena.max_len = length  # filters as long as the rows
    layer = kinds.load(mixer)(configs.validate(config).model, Parameters(jax.random.key(0)), 4)
    graphdef, params = nnx.split(layer, nnx.Param)
    x = jax.random.normal(jax.random.key(1), (batch, length, dim))

    def loss(params, x):
        y, _, _ = nnx.merge(graphdef, params)(x, Context.whole(batch, length), None)
        return jnp.sum(jnp.sin(y))

    return jax.value_and_grad(loss, argnums=(0, 1)), (params, x)


def scan_gradient(dim: int, batch: int, length: int, states: int = 16) -> tuple[Callable, tuple]:
    """The Mamba layer's scan alone, at the layer's sizes."""
    inner = 2 * dim
    keys = jax.random.split(jax.random.key(2), 4)
    u = jax.random.normal(keys[0], (batch, length, inner))
    dt = jax.nn.softplus(jax.random.normal(keys[1], (batch, length, inner)) - 3)
    A = jnp.broadcast_to(-jnp.arange(1.0, states + 1), (inner, states))
    B, C = (jax.random.normal(key, (batch, length, states)) for key in keys[2:])
    loss = lambda *args: jnp.sum(jnp.sin(selective_scan(*args)[0]))
    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)), (u, dt, A, B, C)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (('dim', 128), ('batch', 4), ('length', 512), ('repeats', 9)):
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args(arguments)
    print(f'one layer, forward + backward, B{args.batch} T{args.length} dim {args.dim} (inner {2 * args.dim})')
    cases = {
        name: layer_gradient(mixer, options, args.dim, args.batch, args.length)
        for name, (mixer, options) in CASES.items()
    }
    cases["the mamba layer's scan alone"] = scan_gradient(args.dim, args.batch, args.length)
    timings = compare(cases, args.repeats)
    print(table(timings, BASELINE))
    for name, target in TARGETS.items():
        ratio = timings[name].best / timings[BASELINE].best
        print(f'{name}: {ratio:.2f} times the {BASELINE} (target {target}): {"met" if ratio <= target else "MISSED"}')


if __name__ == '__main__':
    main(sys.argv[1:])
