"""Experts' matrices, and what tokens get of the experts that they chose: the products' forms, and which one runs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import platform
from kernels_pallas.grouped_matmul import grouped_matmul
from mixcon_jax.checks import ConfigError
from mixcon_jax.models.layers import Initializer, Parameters, gated, gated_halves, kept, widened
from mixcon_jax.parallel import expert_parallel, experts
from mixcon_jax.parallel.shared import shared
from mixcon_jax.parallel.split import TOKENS, axes_of, by_parts, shards_of

DENSE_TOKENS = 64  # up to here running every expert is cheaper than sorting
DIMS = {
    'x': 'b t d', 'chosen': 'b t k', 'weights': 'b t k', 'mask': 'b t k',
    'w_gate': 'e d f', 'w_up': 'e d f', 'w_down': 'e f o',
}  # fmt: skip
MATRICES = ('w_gate', 'w_up', 'w_down')

Matrices = dict[str, Array]  # of all experts: w_up, w_down, and of SwiGLU w_gate


def make_experts(
    owner: Any, params: Parameters, options, sizes: tuple[int, int, int], first: Initializer, last: Initializer
) -> None:
    """Gives a module the matrices of ``options.num_experts`` experts.

    Args:
      owner: a module, which gets ``w_up [E, D, F]``, ``w_down [E, F, O]``, and of SwiGLUs ``w_gate`` as ``w_up``.
      params: makes them.
      options: ``config.model.moe``.
      sizes: D, F and O.
      first: of what reads the layer's input.
      last: of ``w_down``.
    """
    count, (dim, width, out) = options.num_experts, sizes
    for name in MATRICES[:2] if options.expert == 'swiglu' else MATRICES[1:2]:
        setattr(owner, name, params(name, (count, dim, width), ('experts', 'embed', 'mlp'), first))
    owner.w_down = params('w_down', (count, width, out), ('experts', 'mlp', 'embed'), last)


class Experts(nnx.Module):
    """The matrices of ``make_experts`` by themselves; arguments as there."""

    def __init__(
        self, params: Parameters, options, sizes: tuple[int, int, int], first: Initializer, last: Initializer
    ) -> None:
        make_experts(self, params, options, sizes, first, last)


def matrices_of(owner: nnx.Module) -> Matrices:
    """The matrices of ``make_experts``, by name, in their own type."""
    return {name: getattr(owner, name)[...] for name in MATRICES if hasattr(owner, name)}


def weighted_sum(
    x: Float[Array, 'b t d'],
    chosen: Int[Array, 'b t k'],
    weights: Float[Array, 'b t k'],
    taken: Bool[Array, 'b t k'],
    matrices: Matrices,
    options,
) -> tuple[Float[Array, 'b t o'], Bool[Array, 'b t k']]:
    """The weighted sum of each token's experts, and which choices were taken.

    Args:
      x: what the experts read.
      chosen: the experts of each token, all different.
      weights: what their results are weighted with; 0 where none takes the token.
      taken: whether the expert takes the token.
      matrices: of all experts, in any type; products are of x's.
      options: ``config.model.moe``.
    """
    count, width = matrices['w_down'].shape[:2]
    form = options.implementation or _form(chosen, count, width)
    if form == 'single':
        return _single(x, chosen, weights, matrices), taken
    matrices = {name: matrix.astype(x.dtype) for name, matrix in matrices.items()}
    if form == 'dense':
        return _dense(x, chosen, weights, matrices), taken
    arrays = {'x': x, 'chosen': chosen, 'weights': weights, 'mask': taken} | matrices
    axes: dict[str, str] = dict(TOKENS)
    summed: tuple[str, ...] = ()
    if shards_of('mlp', width) > 1:  # devices along these axes have a part of every expert's width
        axes['f'], summed = 'mlp', axes_of('mlp')
    if shards_of('experts', count) > 1 and shards_of('batch', len(x)) > 1:
        exchanged = functools.partial(_exchanged, options=options, summed=summed)
        return by_parts(exchanged, arrays, DIMS, ('b t o', 'b t k'), axes | {'e': 'experts'})
    grouped = functools.partial(_grouped, options=options, summed=summed)
    return by_parts(grouped, arrays, DIMS, 'b t o', axes), taken


def _form(chosen: Int[Array, 'b t k'], count: int, width: int) -> str:
    """How products with so many experts of such a width are made where nobody says it."""
    whole = shards_of('experts', count) == shards_of('mlp', width) == shards_of('batch', len(chosen)) == 1
    if whole and chosen.size <= count and platform.platform() == 'cpu':  # no GPU has run it
        return 'single'
    return 'dense' if chosen.shape[0] * chosen.shape[1] <= DENSE_TOKENS else 'grouped'


def _dense(
    x: Float[Array, 'b t d'], chosen: Int[Array, 'b t k'], weights: Float[Array, 'b t k'], matrices: Matrices
) -> Float[Array, 'b t o']:
    """Runs every expert on every token: the smallest form, for few tokens and as an oracle."""
    one_hot = jax.nn.one_hot(chosen, matrices['w_down'].shape[0], dtype=weights.dtype)
    mix = jnp.einsum('btk,btke->bte', weights, one_hot).astype(x.dtype)
    hidden = _activated([kept(jnp.einsum('btd,edf->btef', x, matrix)) for matrix in _first(matrices)])
    return jnp.einsum('btef,bte,efo->bto', hidden, mix, matrices['w_down'])


def _single(
    x: Float[Array, 'b t d'], chosen: Int[Array, 'b t k'], weights: Float[Array, 'b t k'], matrices: Matrices
) -> Float[Array, 'b t o']:
    """Runs one (token, choice) pair after another, of whose expert alone the matrices are read and converted."""

    def through(pair: tuple[Float[Array, ' d'], Int[Array, '']]) -> Float[Array, ' o']:
        row, expert = pair
        own = {name: matrix[expert].astype(row.dtype) for name, matrix in matrices.items()}
        return _activated([row @ matrix for matrix in _first(own)]) @ own['w_down']

    rows = jnp.repeat(x.reshape(-1, x.shape[-1]), chosen.shape[2], axis=0)
    y = jax.lax.map(through, (rows, chosen.reshape(-1)))
    y = widened(y.reshape(*chosen.shape, -1))
    return jnp.sum(y * weights[..., None], axis=2).astype(x.dtype)


def _grouped(
    x: Float[Array, 'b t d'],
    chosen: Int[Array, 'b t k'],
    weights: Float[Array, 'b t k'],
    mask: Bool[Array, 'b t k'],
    options,
    summed: tuple[str, ...] = (),
    **matrices: Array,
) -> Float[Array, 'b t o']:
    """Sorts (token, choice) pairs by expert and multiplies each group by its expert; those of none sort last."""
    batch, length, dim = x.shape
    owner = jnp.where(mask, chosen, options.num_experts)
    order = experts.order(owner.reshape(batch * length, -1), options.num_experts)
    rows = products(experts.dispatch(x.reshape(-1, dim), order), order.group_sizes, matrices, options.group_block)
    y = experts.combine(rows, weights.reshape(batch * length, -1), order).reshape(batch, length, -1)
    return jax.lax.psum(y, summed) if summed else y


def _exchanged(
    x: Float[Array, 'b t d'],
    chosen: Int[Array, 'b t k'],
    weights: Float[Array, 'b t k'],
    mask: Bool[Array, 'b t k'],
    options,
    summed: tuple[str, ...],
    **matrices: Array,
) -> tuple[Float[Array, 'b t o'], Bool[Array, 'b t k']]:
    """``_grouped`` where this device has its own tokens, and experts of its own."""
    across = tuple(axis for axis in axes_of('experts') if jax.lax.axis_size(axis) > 1)
    if options.exchange == 'ragged' and (platform.platform() != 'gpu' or len(across) > 1):
        where = f'experts split over {" and ".join(across)}' if len(across) > 1 else platform.platform()
        raise ConfigError(
            f"model.moe.exchange='ragged' is for GPUs, and for experts split over one mesh axis, not for {where};"
            " choose 'padded'"
        )
    owner = jnp.where(mask, chosen, options.num_experts)
    y, taken = expert_parallel.run(
        x.reshape(-1, x.shape[-1]),
        owner.reshape(-1, owner.shape[-1]),
        weights.reshape(-1, owner.shape[-1]),
        lambda rows, sizes: products(rows, sizes, matrices, options.group_block),
        axes=across,
        num_experts=options.num_experts,
        capacity=options.capacity,
        method=options.exchange or 'padded',
        keep=kept,
    )
    y = jax.lax.psum(y, summed) if summed else y
    return y.reshape(*x.shape[:2], -1), taken.reshape(chosen.shape)


def products(
    rows: Float[Array, 'm d'], group_sizes: Int[Array, ' e'], matrices: Matrices, block: int = 0
) -> Float[Array, 'm o']:
    """Each group of rows through its expert; ``block`` as of ``grouped_matmul``, 0 as that picks."""
    product = shared(grouped_matmul, block=block or None)
    first = _first(matrices)
    # One product for both of SwiGLU's: XLA writes them side by side as it converts them.
    hidden = kept(product(rows, jnp.concatenate(first, axis=-1), group_sizes))
    hidden = gated_halves(hidden) if len(first) == 2 else jax.nn.relu(hidden)
    return kept(product(hidden, matrices['w_down'], group_sizes))


def _first(matrices: Matrices) -> list[Array]:
    """Of an expert's matrices, or all experts', those that read its input: of a SwiGLU gate and up."""
    return [matrices[name] for name in MATRICES[:2] if name in matrices]


def _activated(first: list[Array]) -> Array:
    """What an expert's last matrix reads, of what its first ones give."""
    return gated(*first) if len(first) == 2 else jax.nn.relu(first[0])
