"""Every mixer and FFN as a layer on the GPU: outputs, gradients and states against the same layer on the CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas.cases import relative
from mixcon_jax.models.context import Context
from tests.models import cases

LENGTHS = [41, 1, 70, 9], [3, 57, 48, 5]  # documents of each row, then padding
TOKENS, SPLIT = 123, (64, 1, 1, 57)
TOLERANCE = {'float32': 3e-4, 'bfloat16': 6e-2}  # relative, in the 2-norm; of bfloat16 against the CPU's float32
# What rounding pushes over the kink of a ReLU has another slope: on a CPU these are 0.084 and 0.059 off, and with
# softplus in its place 0.020 and 0.018.
KINKED = {'large_kernel': 0.2, 'moe_switch': 0.15}


def check(name: str, say: Callable[[dict[str, Any]], None]) -> None:
    """Says the errors of one layer of tests/models/cases.py in float32 and bfloat16."""
    exact = on(jax.devices('cpu')[0], name, 'float32')
    for dtype, tolerance in TOLERANCE.items():
        tolerance = KINKED.get(name, tolerance) if dtype == 'bfloat16' else tolerance
        actual = on(jax.devices()[0], name, dtype)
        errors = {key: relative(actual[key], np.asarray(exact[key], np.float64)) for key in exact}
        worst = max(errors, key=lambda key: errors[key] if np.isfinite(errors[key]) else np.inf)
        found: dict[str, Any] = {'layer': name, 'dtype': dtype, 'worst': worst, 'error': float(f'{errors[worst]:.2g}')}
        if not errors[worst] <= tolerance:
            found['errors'] = {key: float(f'{error:.2g}') for key, error in errors.items()}
            found['failed'] = f'{name} in {dtype}: {worst} is off by {errors[worst]:.1e}, more than {tolerance}'
        say(found)


def on(device: Any, name: str, dtype: str) -> dict[str, np.ndarray]:
    """Outputs, gradients, and the outputs of the same row in pieces, of a layer on a device."""
    with jax.default_device(device), jax.default_matmul_precision('highest'):
        layer = cases.layer.__wrapped__(name, dtype)  # made anew: arrays stay where they were made
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        keys = jax.random.split(jax.random.key(11))
        shape = len(LENGTHS), TOKENS, cases.DIM
        x, dy = (jax.random.normal(key, shape).astype(dtype) for key in keys)
        rows = [cases.packed_context(lengths, TOKENS) for lengths in LENGTHS]
        context = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
        mask = context.mask[..., None]

        def loss(params, x):
            y, _, _ = nnx.merge(graph, params, rest)(x, context, None)
            return jnp.sum(jnp.where(mask, y * dy, 0).astype(jnp.float32)), y

        (dparams, dx), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        found = {'y': jnp.where(mask, y, 0), 'dx': jnp.where(mask, dx, 0)}
        flat = jax.tree_util.tree_leaves_with_path(dparams)
        found |= {f'gradient{jax.tree_util.keystr(path)}': leaf for path, leaf in flat}

        step = jax.jit(lambda x, context, state: nnx.merge(graph, params, rest)(x, context, state)[:2])
        state, pieces, start = layer.init_state(len(LENGTHS), TOKENS), [], 0
        for size in SPLIT:
            piece, state = step(x[:, start : start + size], Context.whole(len(LENGTHS), size, start), state)
            pieces.append(piece)
            start += size
        found['in pieces'] = jnp.concatenate(pieces, axis=1)
        return {key: np.asarray(value, np.float64) for key, value in found.items()}
