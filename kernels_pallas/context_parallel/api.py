"""Context-parallel forms: each shard holds a slice of the tokens, and gets what one device would compute for it.

To be called inside `jax.shard_map` that is manual over the axis sharing out the sequence (other axes may stay with
XLA), with arrays of tokens split along time and all others whole on every shard:

    split, whole = PartitionSpec(None, 'context'), PartitionSpec()
    jax.shard_map(scan, in_specs=(split, ..., whole), out_specs=(split, whole), axis_names={'context'}, check_vma=False)

Every recurrence here takes the state before a slice to the state after it by an affine map. A first pass finds the map
without keeping outputs, `exchange` gives each shard its entering state, a second pass is the plain function from there.
Both passes are the package's own single-device functions, in whatever implementation is asked for.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import adaptive_gain
from kernels_pallas import selective_scan as local_scan
from kernels_pallas.attention import attention as local_attention
from kernels_pallas.context_parallel import exchange
from kernels_pallas.context_parallel.exchange import previous as previous  # part of the interface

AXIS = 'context'


def selective_scan(
    u: Float[Array, 'b t d'],
    dt: Float[Array, 'b t d'],
    A: Float[Array, 'd n'],
    B: Float[Array, 'b t n'],
    C: Float[Array, 'b t n'],
    *,
    dt_bias: Float[Array, ' d'] | None = None,
    dt_softplus: bool = False,
    reset: Bool[Array, 'b t'] | None = None,
    initial_state: Float[Array, 'b ...'] | None = None,
    delay: Float[Array, ' d'] | None = None,
    process_noise: tuple | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
    keep_every: int | None = None,
    axis_name: str = AXIS,
    exchange_by: str | None = None,
    **options,
) -> tuple:
    """`kernels_pallas.selective_scan` of the whole sequence, whose slice this shard holds.

    A slice's map is `x -> exp(A sum_k dt_k) x + x_local`, with zero for the product of decays when a document starts in
    it; with `delay` it is a 2x2 matrix for every channel and state. No buffer [B, T, D, N] exists.

    Args:
      u, dt, B, C, reset (and z): this shard's tokens, T of them on every shard.
      initial_state: the state before the whole sequence, the same on every shard; zeros if None.
      process_noise: `(key, std)`, the draw of one device: tokens are counted over the whole sequence.
      axis_name: the mesh axis that shares out the sequence.
      exchange_by: `method` of `exchange.entering_state`.
      options: what reads the states: D, z, readout, prior. They and all others are those of `selective_scan`.

    Returns:
      `(y, final_state)` and with `prior=True` the a-priori outputs: y and those of this shard's tokens, final_state
      that of the whole sequence, on every shard.
    """
    if process_noise is not None:
        key, std, *start = process_noise
        process_noise = (key, std, sum(start) + lax.axis_index(axis_name) * u.shape[1])
    run = partial(
        local_scan,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        reset=reset,
        delay=delay,
        implementation=implementation,
        chunk=chunk,
        keep_every=keep_every,
    )
    _, local, *_ = run(u, dt, A, B, C, process_noise=process_noise)
    if initial_state is None:
        initial_state = jnp.zeros_like(local)
    if delay is None:
        step = dt.astype(local.dtype)
        step = step if dt_bias is None else step + dt_bias
        step = jax.nn.softplus(step) if dt_softplus else step
        linear = jnp.exp(jnp.sum(step, 1)[..., None] * A)
        if reset is not None:
            linear = jnp.where(jnp.any(reset, 1)[:, None, None], 0, linear)
        act: exchange.Act = jnp.multiply
        compose: exchange.Compose = jnp.multiply
    else:
        # Without input a state is carried by the product of the tokens' companion matrices: column by column.
        basis = jnp.broadcast_to(jnp.eye(2, dtype=local.dtype)[:, None, :, None, None], (2, *local.shape))
        linear = jax.vmap(lambda state: run(jnp.zeros_like(u), dt, A, B, C, initial_state=state)[1])(basis)
        act, compose = partial(jnp.einsum, 'jbidn,bjdn->bidn'), partial(jnp.einsum, 'jbkdn,kbidn->jbidn')
    entering = exchange.entering_state(
        linear,
        local,
        initial_state.astype(local.dtype),
        act=act,
        compose=compose,
        axis_name=axis_name,
        method=exchange_by,
    )
    y, final, *prior = run(u, dt, A, B, C, process_noise=process_noise, initial_state=entering, **options)
    return y, exchange.of_last_shard(final, axis_name), *prior


def matrix_gain(
    e: Float[Array, 'b t h p'],
    alpha: Float[Array, 'b t h'],
    log_decay: Float[Array, 'b t h'],
    *,
    reset: Bool[Array, 'b t'] | None = None,
    initial_gain: Float[Array, 'b h p p'] | None = None,
    axis_name: str = AXIS,
    exchange_by: str | None = None,
    **options,
) -> tuple[Float[Array, 'b t h p'], Float[Array, 'b h p p']]:
    """`kernels_pallas.adaptive_gain.matrix_gain` of the whole sequence, whose slice this shard holds.

    A slice's map is `K -> K M + N`, P x P per head, M being the product of its tokens' `lam (I - alpha phi phi^T)`.

    Args:
      e, alpha, log_decay, reset: this shard's tokens.
      initial_gain: the gain before the whole sequence, the same on every shard; zeros if None.
      axis_name, exchange_by: as in `selective_scan`.
      options: implementation and chunk.

    Returns:
      `(K e of this shard's tokens, final gain of the whole sequence, on every shard)`.
    """
    run = partial(adaptive_gain.matrix_gain, e, alpha, log_decay, reset=reset, **options)
    unit = jnp.broadcast_to(jnp.eye(e.shape[3]), (e.shape[0], e.shape[2], e.shape[3], e.shape[3]))
    return _gain(run, unit, initial_gain, jnp.matmul, axis_name, exchange_by)


def diagonal_gain(
    e: Float[Array, 'b t h p'],
    alpha: Float[Array, 'b t h'],
    log_decay: Float[Array, 'b t h'],
    *,
    reset: Bool[Array, 'b t'] | None = None,
    initial_gain: Float[Array, 'b h p'] | None = None,
    axis_name: str = AXIS,
    exchange_by: str | None = None,
    **options,
) -> tuple[Float[Array, 'b t h p'], Float[Array, 'b h p']]:
    """`kernels_pallas.adaptive_gain.diagonal_gain` in the same way, its maps elementwise and its gains [B, H, P]."""
    run = partial(adaptive_gain.diagonal_gain, e, alpha, log_decay, reset=reset, **options)
    return _gain(run, jnp.ones((e.shape[0], *e.shape[2:])), initial_gain, jnp.multiply, axis_name, exchange_by)


def _gain(run, unit, initial_gain, product, axis_name, exchange_by):
    """Runs a gain whose maps compose, and act on gains from the right, by `product`; `unit` is the identity map."""
    # From two gains at once: what the slice does to the one it does to their difference, less what it writes.
    local, carried = jax.vmap(lambda gain: run(initial_gain=gain)[1])(jnp.stack([jnp.zeros_like(unit), unit]))
    entering = exchange.entering_state(
        carried - local,
        local,
        jnp.zeros_like(local) if initial_gain is None else initial_gain.astype(local.dtype),
        act=lambda linear, gain: product(gain, linear),
        compose=product,
        axis_name=axis_name,
        method=exchange_by,
    )
    out, final = run(initial_gain=entering)
    return out, exchange.of_last_shard(final, axis_name)


def attention(
    q: Float[Array, 'b t h d'],
    k: Float[Array, 'b t k d'],
    v: Float[Array, 'b t k d'],
    *,
    segment_ids: Int[Array, 'b t'] | None = None,
    axis_name: str = AXIS,
    **options,
) -> Float[Array, 'b t h d']:
    """`kernels_pallas.attention` for the queries of this shard, which gathers the keys and values of all.

    Attention reads every earlier token, so that communication grows with the sequence: 2 T K d values a shard. With few
    key heads (grouped queries) that is little beside the products.

    Args:
      q, k, v, segment_ids: this shard's tokens.
      axis_name: the mesh axis that shares out the sequence.
      options: scale, implementation and block_size.
    """
    return local_attention(
        q,
        exchange.gather_tokens(k, axis_name),
        exchange.gather_tokens(v, axis_name),
        segment_ids=segment_ids,
        kv_segment_ids=None if segment_ids is None else lax.all_gather(segment_ids, axis_name, axis=1, tiled=True),
        q_offset=lax.axis_index(axis_name) * q.shape[1],
        **options,
    )
