"""Hyena's modal form: filters that are sums of damped waves, so that decoding carries a constant number of states."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixcon_jax.checks import divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters, zeros
from mixcon_jax.models.mixers.gated_conv import GatedConvolution
from mixcon_jax.options import COUNT, POSITIVE, Option, at_least
from mixcon_jax.parallel.kernels import modal_conv

SLOWEST, FASTEST, WIDEST = 0.999, 0.9, math.pi / 10  # initial |lambda|, and its angle at most
OPS_PER_MODE = 12  # of complex numbers a product and a sum, and what the output reads of one


class HyenaModal(GatedConvolution):
    """StripedHyena's gated convolution (Together, 2023): h_t = Re sum_n R_n lambda_n^t for t >= 0, and a skip D.

    lambda = exp(-softplus(a) + i theta), S of them a channel, so that none grows; the released code leaves them free
    and does not say how they start. Here |lambda| spreads over [0.9, 0.999] and theta over [0, pi / 10], evenly and
    not at random; R is normal with the standard deviation sqrt((1 - |lambda|^2) / S), by which every wave has about
    the same energy; D is 0. The code's branches [x2 | x1 | v] are x_0, x_1 and v here, each with its own matrix.
    """

    OPTIONS = {
        'hyena_modal': {
            'order': Option(2, 'Order N: gates; N - 1 long filters.', at_least(2)),
            'd_conv': Option(3, 'Width of the short causal convolutions.', POSITIVE),
            'd_state': Option(2, 'Complex modes S a channel.', POSITIVE),
            'chunk': Option(0, 'Tokens a chunk of the scan; 0 picks for the platform.', COUNT, free=True),
        }
    }

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor', shards['inner'], 'model.dim', model.dim)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """The states' updates and reading."""
        options = model.hyena_modal
        return OPS_PER_MODE * (options.order - 1) * model.dim * options.d_state

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options = options = config.hyena_modal
        super().__init__(config, params, num_layers, options.order, options.d_conv)
        shape, axes = (self.filters, options.d_state, self.dim), ('terms', 'state', 'inner')
        self.decay = params('decay', shape, axes, _decays, decay=False)
        self.angle = params('angle', shape, axes, lambda key, shape: WIDEST * _spread(shape, 0.5), decay=False)
        self.residue = params(
            'residue', (shape[0], 2, *shape[1:]), ('terms', 'narrow', *axes[1:]), _residues, decay=False
        )
        self.skip = params('skip', (self.filters, self.dim), ('terms', 'inner'), zeros, decay=False)

    def filter_states(self, batch: int, max_len: int) -> list[Any]:
        del max_len
        shape = (batch, 2, self.options.d_state, self.dim)
        return [jnp.zeros(shape, jnp.float32) for _ in range(self.filters)]

    def filtered(
        self, values: Float[Array, 'b t d'], index: int, context: Context, state: Any
    ) -> tuple[Float[Array, 'b t d'], Any]:
        y, final = modal_conv(
            values,
            jax.nn.softplus(self.decay[index]),
            self.angle[index],
            self.residue[index],
            skip=self.skip[index],
            reset=context.reset,
            mask=None if state is None else context.mask,  # without a state nobody asks what padding leaves
            initial_state=state,
            chunk=self.options.chunk or None,
        )
        return y, None if state is None else final


def _spread(shape: Sequence[int], offset: float) -> Float[Array, '...']:
    """Numbers that fill [0, 1) evenly, neighbours far apart."""
    golden = (math.sqrt(5) - 1) / 2
    return ((jnp.arange(math.prod(shape)) + offset) * golden % 1.0).reshape(shape)


def _magnitudes(shape: Sequence[int]) -> Float[Array, '...']:
    return FASTEST + (SLOWEST - FASTEST) * _spread(shape, 0.0)


def _decays(key, shape):
    del key
    rate = -jnp.log(_magnitudes(shape))
    return rate + jnp.log(-jnp.expm1(-rate))  # whose softplus is the rate


def _residues(key, shape):
    filters, _, modes, channels = shape
    energy = 1 - _magnitudes((filters, modes, channels)) ** 2
    return jnp.sqrt(energy / modes)[:, None] * jax.random.normal(key, shape)
