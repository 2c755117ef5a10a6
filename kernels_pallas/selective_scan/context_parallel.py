"""The selective scan of a sequence that a mesh axis shares out, and how a mesh may split the call."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import exchange
from kernels_pallas.call import Call, bind
from kernels_pallas.selective_scan import api

READING = ('D', 'z', 'readout', 'prior')  # the arguments that read the states and do not move them
MOVED_BY = {'mosaic_gpu_scaled': 'mosaic_gpu'}  # what moves the states where an implementation is of a readout alone


def selective_scan(*args, axis_name: str = exchange.AXIS, exchange_by: str | None = None, **kwargs) -> tuple:
    """`kernels_pallas.selective_scan` of the whole sequence, whose slice this shard holds.

    A slice's map is `x -> exp(A sum_k dt_k) x + x_local`, with zero for the product of decays when a document starts in
    it; with `delay` it is a 2x2 matrix for every channel and state. No buffer [B, T, D, N] exists.

    Args:
      args, kwargs: those of `selective_scan`. u, dt, B, C, z and reset are this shard's tokens, T of them on every
        shard; initial_state is the state before the whole sequence, the same on every shard; process_noise is the draw
        of one device: tokens are counted over the whole sequence.
      axis_name: the mesh axis that shares out the sequence.
      exchange_by: `method` of `exchange.entering_state`.

    Returns:
      As `selective_scan`: y and the a-priori outputs are those of this shard's tokens, the final state that of the
      whole sequence, on every shard.
    """
    call = bind(api.selective_scan, *args, **kwargs)
    u, dt, A, dt_bias, reset, delay = (call[name] for name in ('u', 'dt', 'A', 'dt_bias', 'reset', 'delay'))
    if call['process_noise'] is not None:
        key, std, *start = call['process_noise']
        call['process_noise'] = (key, std, sum(start) + lax.axis_index(axis_name) * u.shape[1])
    moving = {name: value for name, value in call.items() if name not in READING}
    moving['implementation'] = MOVED_BY.get(call['implementation'], call['implementation'])
    run = lambda **changed: api.selective_scan(**(moving | changed))
    _, local = run(initial_state=None)
    if delay is None:
        step = dt.astype(local.dtype)
        step = step if dt_bias is None else step + dt_bias
        step = jax.nn.softplus(step) if call['dt_softplus'] else step
        linear = jnp.exp(jnp.sum(step, 1)[..., None] * A)
        if reset is not None:
            linear = jnp.where(jnp.any(reset, 1)[:, None, None], 0, linear)
        act: exchange.Act = jnp.multiply
        compose: exchange.Compose = jnp.multiply
    else:
        # Without input a state is carried by the product of the tokens' companion matrices: column by column.
        basis = jnp.broadcast_to(jnp.eye(2, dtype=local.dtype)[:, None, :, None, None], (2, *local.shape))
        silent = {'u': jnp.zeros_like(u), 'process_noise': None}
        linear = jax.vmap(lambda state: run(**silent, initial_state=state)[1])(basis)
        act, compose = partial(jnp.einsum, 'jbidn,bjdn->bidn'), partial(jnp.einsum, 'jbkdn,kbidn->jbidn')
    initial = call['initial_state']
    initial = jnp.zeros_like(local) if initial is None else initial.astype(local.dtype)
    call['initial_state'] = exchange.entering_state(
        linear, local, initial, act=act, compose=compose, axis_name=axis_name, method=exchange_by
    )
    y, final, *prior = api.selective_scan(**call)
    return y, exchange.of_last_shard(final, axis_name), *prior


def _results(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    state = 'b d n' if arguments['delay'] is None else 'b slots d n'
    return ('b t d', state, 'b t d') if arguments['prior'] else ('b t d', state)


CALL = Call(
    api.selective_scan,
    results=_results,
    axes={'b': 'batch', 't': 'sequence', 'd': 'inner'},
    context_parallel=selective_scan,
    # Noise is drawn for all rows and channels at once.
    whole=lambda arguments: () if arguments['process_noise'] is None else ('b', 'd'),
)
