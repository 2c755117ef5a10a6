"""`long_conv` in plain XLA: the nearest lags one by one, all others by what halves of pieces add to each other.

Of a piece of 2 H tokens the first half adds to the second alone, and only within the one document that goes over the
border between them: a mask on either side of a product with one matrix keeps documents apart, and no token hears of a
later one, not even by rounding. The matrix has the same values along its diagonals: long pieces multiply by it in the
frequency domain, short ones as it is.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 4  # tokens whose lags are added one by one
PRODUCT_UP_TO = 64  # tokens of a half that is multiplied by its matrix


def halves(v, taps, positions, past, block=None):
    """Output of `api.long_conv` [B, T, D], all in one type, without skip."""
    y = within(v, taps, positions, v.shape[1], block)
    return y if past is None else y + _from_past(past, taps, positions, v.shape[1])


def within(v, taps, positions, span, block=None):
    """What tokens of the same piece of `span` tokens add to each other, `block` times a power of two if not all."""
    half = block or BLOCK
    parts = [partial(_block, block=half)]
    while half < min(span, v.shape[1]):
        parts.append(partial(_level, half=half, add=_product if half <= PRODUCT_UP_TO else _spectral))
        half *= 2
    by_channel = _summed(jnp.moveaxis(v, 2, 0), jnp.swapaxes(taps, 0, 1), positions, tuple(parts))
    return jnp.moveaxis(by_channel, 0, 2)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed(v, taps, positions, parts):
    """The sum of `part(v, taps, positions)`, one after another: left alone, XLA would have all of them at once.

    The gradient computes each part again, since what lies between, such as spectra, is larger than all else.
    """
    y = jnp.zeros_like(v)
    for part in parts:
        y, v = lax.optimization_barrier((y + part(v, taps, positions), v))
    return y


def _summed_forward(v, taps, positions, parts):
    return _summed(v, taps, positions, parts), (v, taps, positions)


def _summed_backward(parts, kept, dy):
    v, taps, positions = kept
    total = jnp.zeros_like(v), jnp.zeros_like(taps)
    for part in parts:
        _, transpose = jax.vjp(lambda v, taps, part=part: part(v, taps, positions), v, taps)
        total, v, dy = lax.optimization_barrier((jax.tree.map(jnp.add, total, transpose(dy)), v, dy))
    return *total, None


_summed.defvjp(_summed_forward, _summed_backward)


def fft(v, taps, positions, past, mask=None, block=None):
    """The same by one FFT of the whole row, if each row is one document from its first token on."""
    length, apart = v.shape[1], lambda v, taps: halves(v, taps, positions, past, block)

    def together(v, taps):
        size = 2 * length
        spectrum = jnp.fft.rfft(v, size, 1) * jnp.fft.rfft(_fitted(taps, length, 0), size, 0)
        return jnp.fft.irfft(spectrum, size, 1)[:, :length]

    if past is not None:
        return apart(v, taps)
    together = jax.checkpoint(together)
    if positions is None:
        return together(v, taps)
    whole = positions == jnp.arange(length)
    return lax.cond(jnp.all(whole if mask is None else whole | ~mask), together, apart, v, taps)


def operations(length, block=None):
    """Multiplications and additions of `halves` for a token and channel."""
    half = block or BLOCK
    count = 2.0 * min(half, length)
    while half < length:
        # Of 2 * half tokens: a product with a matrix, or three real FFTs, the taps' own shared by all pieces.
        count += half if half <= PRODUCT_UP_TO else 5 * math.log2(2 * half) + 3
        half *= 2
    return count


def _block(v, taps, positions, block):
    """What tokens of the same block of `block` tokens add, one lag after another: v [D, B, T], taps [D, L]."""
    length = v.shape[2]
    inside = jnp.arange(length) % block
    reach = jnp.broadcast_to(inside, v.shape[1:]) if positions is None else jnp.minimum(positions, inside)
    y = taps[:, 0, None, None] * v
    for lag in range(1, min(block, length, taps.shape[1])):
        earlier = jnp.pad(v, ((0, 0), (0, 0), (lag, 0)))[:, :, :length]
        y = y + taps[:, lag, None, None] * jnp.where(reach >= lag, earlier, 0)
    return y


def _level(v, taps, positions, half, add):
    """What first halves of all pieces of 2 * half tokens add to the second: v [D, B, T], taps [D, L]."""
    channels, batch, length = v.shape
    pieces = -(-(length - half) // (2 * half))
    shape = (pieces, 2, half)
    first = _fitted(v, pieces * 2 * half, 2).reshape(channels, batch, *shape)[:, :, :, 0]
    if positions is not None:
        place = _fitted(positions, pieces * 2 * half, 1).reshape(batch, *shape)[:, :, 1]
        after = jnp.arange(half)  # of the second half, from the border on; the first lies half - after before it
        first = jnp.where(half - after <= place[..., :1], first, 0)
    second = add(first, _fitted(taps, 2 * half, 1), half)
    if positions is not None:
        second = jnp.where(place > after, second, 0)
    both = jnp.stack([jnp.zeros_like(second), second], 3)
    return _fitted(both.reshape(channels, batch, pieces * 2 * half), length, 2)


def _product(first, taps, half):
    """Of [D, B, pieces, half] what every token j adds to those half - j + i after it, by a matrix for every channel."""
    # Read in rows of one lag less than there are, the taps come one place later with every row: the matrix without a
    # gather, whose gradient would be a scatter.
    turned = jnp.tile(jnp.roll(taps, -half, 1), half)[:, : half * (2 * half - 1)]
    matrix = turned.reshape(-1, half, 2 * half - 1)[:, :, :half]
    return jnp.einsum('dbpj,dji->dbpi', first, matrix, precision='highest')


def _spectral(first, taps, half):
    spectrum = jnp.fft.rfft(first, 2 * half) * jnp.fft.rfft(taps)[:, None, None]
    return jnp.fft.irfft(spectrum, 2 * half)[..., half:]


def _from_past(past, taps, positions, length):
    """What tokens before the call [B, P, D] add to its own."""
    behind = past.shape[1]
    if length == 1:
        lags = _fitted(taps, behind + 1, 0)[:0:-1]
        y = jnp.einsum('bpd,pd->bd', past, lags, precision='highest')[:, None]
    else:
        size = 1 << (behind + length - 1).bit_length()
        spectrum = jnp.fft.rfft(past, size, 1) * jnp.fft.rfft(_fitted(taps, behind + length, 0), size, 0)
        y = jnp.fft.irfft(spectrum, size, 1)[:, behind : behind + length]
    return y if positions is None else jnp.where((positions > jnp.arange(length))[..., None], y, 0)


def _fitted(x, length, axis):
    """x with zeros behind it, or cut, so that it has this length along an axis."""
    x = lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
    return jnp.pad(x, [(0, length - x.shape[i]) if i == axis else (0, 0) for i in range(x.ndim)])
