"""Whole train steps of a MixCon of attention, Mamba, Conba, MLPs and experts, against the losses that the CPU finds."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from mixcon_jax import config as configs
from mixcon_jax.models.presets import conba
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.step import make_steps
from tests.training import random_batch

BATCHES = 4  # different ones
TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}  # relative, of any of the losses


def config(preset: str, dtype: str, tiny: bool) -> ml_collections.ConfigDict:
    """Attention, Mamba, Conba, MLPs and experts, two microbatches a step."""
    made = configs.default()
    model = made.model
    model.update(dim=64, vocab_size=256, num_blocks=2, init_std=0.05, dtype=dtype, tie_embeddings=True)
    model.pattern = ('conba+moe', 'mamba+mlp', 'attention+moe', 'conba+mlp')
    model.attention.update(num_heads=4, num_kv_heads=2, rope=True)
    model.moe.update(num_experts=4, top_k=2, hidden_dim=64, implementation='grouped')
    model.conba.update(conba(preset))
    model.conba.head_dim, model.ssm.d_state = 32, 16
    made.data.seq_len = 200
    made.train.update(batch_size=8, accum_steps=2, steps=20, loss_chunk=300)
    made.optim.update(warmup_steps=2, learning_rate=2e-3)
    if tiny:
        model.update(dim=32, num_blocks=1, pattern=('conba+moe', 'attention+mlp'))
        model.ssm.d_state, model.conba.head_dim, made.data.seq_len, made.train.steps = 4, 16, 24, BATCHES + 1
    return configs.validate(made)


def losses(device: Any, made: ml_collections.ConfigDict) -> list[float]:
    """The loss of every step on a device, from the same initial values and batches of packed, padded rows."""
    with jax.default_device(device), jax.default_matmul_precision('highest'):
        mesh = make_mesh(made.mesh, [device])
        steps = make_steps(made, mesh)
        initial = make_steps(made, make_mesh(made.mesh, [jax.devices('cpu')[0]]))
        with jax.default_device(jax.devices('cpu')[0]):
            start = jax.device_get(initial.init_state())
        state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), start, steps.abstract_state)
        found = []
        for number in range(made.train.steps):
            batch = random_batch(number % BATCHES, made.train.batch_size, made.data.seq_len, made.model.vocab_size)
            state, metrics = steps.train_step(state, steps.put(batch))
            found.append(float(metrics['loss']))
        return found


def check(preset: str, dtype: str, tiny: bool, say: Callable[[dict[str, Any]], None]) -> None:
    """Says the losses on both, and whether they agree and fall."""
    expected = losses(jax.devices('cpu')[0], config(preset, 'float32', tiny))
    actual = losses(jax.devices()[0], config(preset, dtype, tiny))
    error = float(np.max(np.abs(np.array(actual) / np.array(expected) - 1)))
    found: dict[str, Any] = {'preset': preset, 'dtype': dtype, 'losses': actual, 'cpu': expected}
    found['error'] = float(f'{error:.2g}')
    if not error <= TOLERANCE[dtype]:
        found['failed'] = f'{preset} in {dtype}: a loss is off by {error:.1e}, more than {TOLERANCE[dtype]}'
    elif not (later := actual[::BATCHES][-1]) < actual[0]:
        found['failed'] = f'{preset} in {dtype}: the first batch had a loss of {actual[0]:.3f}, later of {later:.3f}'
    say(found)
