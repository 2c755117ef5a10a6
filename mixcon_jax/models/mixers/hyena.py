"""Hyena: long filters that a small network makes of positions, as long as the sequences of the model."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.long_conv.xla import operations
from mixcon_jax.checks import ConfigError, at_most, divides
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters, constant, normal, uniform
from mixcon_jax.models.mixers.gated_conv import GatedConvolution
from mixcon_jax.options import COUNT, POSITIVE, Option, above, at_least, one_of
from mixcon_jax.parallel.kernels import long_conv

TARGET = 1e-2  # to what the window falls at the decays' shares of the longest sequence


class Hyena(GatedConvolution):
    """Gated convolutions with implicit filters (Poli et al., 2023): h_t = MLP(features of t) (exp(-t |delta|) + shift).

    t = n / (L - 1) is a place in the longest sequence of L tokens, its features are t, cos(2 pi f n / L) and
    -sin(2 pi f n / L) for frequencies f from 1e-4 to their number less one, and the MLP's activations are sin(w u) with
    one trained w for all of its layers, as in the released code; y = h * v + D v with D ~ N(0, 1). delta differs by
    channel and is not trained. Another L makes other filters of the same weights: it stays with a model. Features and
    window are float32.
    """

    OPTIONS = {
        'hyena': {
            'order': Option(2, 'Order N: gates; N - 1 long filters.', at_least(2)),
            'd_conv': Option(3, 'Width of the short causal convolutions.', POSITIVE),
            'max_len': Option(
                2048, 'Longest sequence L, which filters are made for; lags from L on count nothing.', at_least(2)
            ),
            'features': Option(
                33, 'Features of a position, odd: 1 and a cosine and a sine for each frequency.', at_least(3)
            ),
            'filter_width': Option(64, 'Width of the network that makes filters.', POSITIVE),
            'filter_depth': Option(4, 'Its matrices, the first and the last included.', at_least(2)),
            'frequency': Option(14.0, 'Initial frequency w of its sines; 10 for recall.', above(0.0), learning=True),
            'fast_decay': Option(0.3, 'Share of L in which the fastest window falls to 0.01.', above(0.0)),
            'slow_decay': Option(1.5, 'The same of the slowest.', above(0.0)),
            'shift': Option(0.0, 'Added to the windows, below which they then do not fall.', at_least(0.0)),
            'filter_rate': Option(
                1.0,
                'Learning rate of the network that makes filters, as a multiple of that of all else.',
                at_least(0.0),
                learning=True,
            ),
            'implementation': Option(
                '',
                'Long convolution: "" picks; "fft" takes one FFT of the rows of a batch without packed documents.',
                one_of('', 'halves', 'fft', 'reference'),
                free=True,
            ),
            'block': Option(0, 'Tokens whose lags are summed one by one; 0 picks.', COUNT, free=True),
        }
    }

    @staticmethod
    def check(model) -> None:
        options = model.hyena
        if not options.features % 2:
            raise ConfigError(f'model.hyena.features={options.features} must be odd')
        at_most('model.hyena.fast_decay', options.fast_decay, 'model.hyena.slow_decay', options.slow_decay)

    @staticmethod
    def check_split(model, shards) -> None:
        divides('mesh.tensor * mesh.context', shards['inner'] * shards['sequence'], 'model.dim', model.dim)

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """The long convolutions; a batch's rows share what makes their filters, which is left out."""
        options = model.hyena
        return (options.order - 1) * model.dim * operations(seq_len, options.block or None)

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        self.options = options = config.hyena
        super().__init__(config, params, num_layers, options.order, options.d_conv)
        rate, width = options.filter_rate, options.filter_width
        for i in range(options.filter_depth - 1):
            inputs = width if i else options.features
            init = uniform(inputs**-0.5)
            weight = params(f'filter_w{i}', (inputs, width), ('narrow', 'filter'), init, decay=False, rate=rate)
            setattr(self, f'filter_w{i}', weight)
            setattr(self, f'filter_b{i}', params(f'filter_b{i}', (width,), ('filter',), init, decay=False, rate=rate))
        self.frequency = params('frequency', (width,), ('filter',), constant(options.frequency), decay=False, rate=rate)
        shape = (self.filters, width, self.dim)
        self.filter_out = params(
            'filter_out', shape, ('terms', 'filter', 'inner'), uniform(width**-0.5), decay=False, rate=rate
        )
        self.skip = params('skip', (self.filters, self.dim), ('terms', 'inner'), normal(1.0), decay=False)

    def taps(self, length: int) -> Float[Array, 'n l d']:
        """The long filters' first values, as many as there are tokens, or ``max_len``; float32."""
        options = self.options
        places = jnp.arange(options.max_len, dtype=jnp.float32)[:, None]
        bands = (options.features - 1) // 2
        time = places / (options.max_len - 1)
        angles = jnp.linspace(1e-4, bands - 1, bands) * (2 * math.pi / options.max_len) * places
        u = jnp.concatenate([time, jnp.cos(angles), -jnp.sin(angles)], 1)
        exact = jax.lax.Precision.HIGHEST
        for i in range(options.filter_depth - 1):
            weight, bias = getattr(self, f'filter_w{i}')[...], getattr(self, f'filter_b{i}')[...]
            u = jnp.sin(self.frequency[...] * (jnp.matmul(u, weight, precision=exact) + bias))
        # Rounding grows by the frequency with every matrix: all lengths have the same places, computed alike.
        u, time = u[:length], time[:length]
        taps = jnp.einsum('lf,nfd->nld', u, self.filter_out[...], precision=exact)
        slow, fast = (math.log(TARGET) / share for share in (options.slow_decay, options.fast_decay))
        # The released code has the channels of all filters in one row, a channel's filters side by side.
        delta = jnp.abs(jnp.linspace(slow, fast, self.filters * self.dim)).reshape(self.dim, self.filters).T
        return taps * (jnp.exp(-time * delta[:, None]) + options.shift)

    def filter_states(self, batch: int, max_len: int) -> list[Any]:
        """A cache of what a filter reads of the past, and the filter, so that no token makes it anew."""
        taps = self.taps(max(2, max_len))
        past = jnp.zeros((batch, taps.shape[1] - 1, self.dim), self.dtype)
        return [{'past': past, 'taps': taps[index]} for index in range(self.filters)]

    def filtered(
        self, values: Float[Array, 'b t d'], index: int, context: Context, state: Any
    ) -> tuple[Float[Array, 'b t d'], Any]:
        y, past = long_conv(
            values,
            self.taps(values.shape[1])[index] if state is None else state['taps'],
            skip=self.skip[index],
            positions=context.positions,
            mask=context.mask,
            initial_state=None if state is None else state['past'],
            implementation=self.options.implementation or None,
            block=self.options.block or None,
        )
        return y, None if state is None else {'past': past, 'taps': state['taps']}
