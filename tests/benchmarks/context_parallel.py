"""What a layer's devices tell each other when they share sequences, counted from the compiled gradient.

`python -m tests.benchmarks context_parallel` compiles each layer, forward and backward, for `--shards` devices at
several lengths and lists its collectives: how many, and the bytes that a device puts in or gets out, whichever is more.
Nothing is executed. The sums over parameters' gradients are those of data parallelism; the rest is the sequence's.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax import config as configs
from mixcon_jax.models import kinds, presets
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.planning.collectives import COLLECTIVES, collectives, of_sequence

LAYERS = {'mamba': 'mamba'} | dict.fromkeys(presets.CONBA_PRESETS, 'conba') | {'attention': 'attention'}


def layer_gradient(
    name: str, shards: int, batch: int, length: int, dim: int, data: int = 1, devices: Sequence[Any] = ()
) -> str:
    """The compiled text of a layer's gradient by inputs and parameters, in bfloat16, tokens split over the devices.

    Args:
      name: a key of LAYERS.
      shards: devices that share a sequence.
      batch, length, dim: of the input.
      data: into how many parts the rows are split.
      devices: to compile for; JAX's own if empty, absent GPUs (planning.compiling) if they are to be.
    """
    config = configs.default()
    config.model.update(dim=dim, dtype='bfloat16')
    if name in presets.CONBA_PRESETS:
        config.model.conba.update(presets.conba(name))
    config.mesh.update(data=data, context=shards)
    config.data.seq_len = length
    config = configs.validate(config)
    used = (devices or jax.devices())[: data * shards]
    mesh = make_mesh(config.mesh, used)
    mixer = nnx.eval_shape(lambda: kinds.load(LAYERS[name])(config.model, Parameters(None), 1))
    graphdef, params = nnx.split(mixer)
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec('data', 'context'))

    def loss(params, x, segment_ids, positions):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            y, _, aux = nnx.merge(graphdef, params)(x, Context(segment_ids, positions, train=True), None)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), aux

    gradient = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), out_shardings=(None, (everywhere, split))
    )
    shaped = lambda shape, dtype: jax.ShapeDtypeStruct((batch, length, *shape), dtype, sharding=split)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), params)
    tokens = shaped((), jnp.int32)
    with jax.default_device(used[0]):  # whose kernels are asked for
        traced = gradient.trace(params, shaped((dim,), jnp.bfloat16), tokens, tokens)
        return traced.lower(lowering_platforms=('cuda' if devices else 'cpu',)).compile().as_text()


def lines(names: Iterable[str], shards: int, batch: int, lengths: Sequence[int], dim: int) -> Iterator[str]:
    """A line for every layer and length: of each kind of collective, how many and the KiB of all."""
    yield f'{"KiB (number)":12}{"T":>7}' + ''.join(f'{kind:>20}' for kind in COLLECTIVES) + f'{"sequence":>12}'
    for name in names:
        for length in lengths:
            found = collectives(layer_gradient(name, shards, batch, length, dim))
            cells = (f'{size / 2**10:.0f} ({number})' for number, size in found.values())
            yield f'{name:12}{length:7}{"".join(f"{cell:>20}" for cell in cells)}{of_sequence(found) / 2**10:12.0f}'


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {'shards': 4, 'batch': 1, 'dim': 1024}.items():
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--lengths', type=int, nargs='+', default=(1024, 4096))
    args = parser.parse_args(arguments)
    if jax.device_count() < args.shards:  # JAX has started with fewer: again, in a process of its own
        flags = f'--xla_force_host_platform_device_count={args.shards} --xla_backend_optimization_level=0'
        command = [sys.executable, '-m', 'tests.benchmarks.context_parallel', *arguments]
        subprocess.run(command, env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}, check=True)
        return
    print(f'forward + backward of one layer on {args.shards} devices: batch {args.batch}, width {args.dim}, bfloat16')
    for line in lines(LAYERS, args.shards, args.batch, args.lengths, args.dim):
        print(line, flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
