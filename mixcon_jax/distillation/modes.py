"""Sums of damped waves that come near a filter: poles from its Hankel matrix, residues by least squares. NumPy alone.

h_t ~ Re sum_n R_n lambda_n^t (Massaroli et al., 2023). A filter that is such a sum has a Hankel matrix h_{i+j} of as
many dimensions as the sum has poles, and a shift by one token acts on them as a matrix whose eigenvalues are the poles
(Kung, 1978; ESPRIT, Roy and Kailath, 1989).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

COLUMNS = 256  # of the Hankel matrix at most: waves that differ within so many tokens
SLOWEST, FASTEST = 1e-6, 30.0  # rates: no wave grows, and one that is gone after a token is gone
CUTOFF = 1e-7  # of least squares: residues that nearly cancel would be lost in float32


class Modes(NamedTuple):
    """The waves of every channel, float64; of a channel that needs fewer than S the rest are 0.

    Attributes:
      rate, angle: `[S, C]`, with lambda = exp(-rate + i angle).
      residue: `[2, S, C]`, real and imaginary part of R.
    """

    rate: Float[np.ndarray, 's c']
    angle: Float[np.ndarray, 's c']
    residue: Float[np.ndarray, 'two s c']

    def filters(self, length: int) -> Float[np.ndarray, 'l c']:
        """The sums at the first lags."""
        total = np.zeros((length, self.rate.shape[1]))
        for rate, angle, real, imaginary in zip(self.rate, self.angle, *self.residue, strict=True):
            wave = np.exp(np.arange(length)[:, None] * (1j * angle - rate))
            total += real * wave.real - imaginary * wave.imag
        return total


def most_waves(length: int) -> int:
    """How many waves a filter of so many lags can be told apart into; two that are conjugate count as two."""
    return min((length + 1) // 2, COLUMNS) - 1


def fit(filters: Float[np.ndarray, 'l c'], order: int = 0, tolerance: float = 1e-2) -> Modes:
    """Fits every channel by itself.

    Args:
      filters: `[L, C]`, L >= 4.
      order: waves S a channel at most; 0 takes as many as the tolerance asks for.
      tolerance: without an order, what share of the Hankel matrix, by the root of the sum of its squared singular
        values, may be left out.

    Returns:
      As many waves as the channel with the most has.
    """
    found = [_channel(np.asarray(h, np.float64), order, tolerance) for h in filters.T]
    most = max(1, *(len(poles) for poles, _ in found))
    modes = Modes(np.ones((most, len(found))), np.zeros((most, len(found))), np.zeros((2, most, len(found))))
    for channel, (poles, residues) in enumerate(found):
        used = slice(0, len(poles))
        modes.rate[used, channel] = np.clip(-np.log(np.abs(poles)), SLOWEST, FASTEST)
        modes.angle[used, channel] = np.angle(poles)
        modes.residue[:, used, channel] = residues.real, residues.imag
    return modes


def error(filters: Float[np.ndarray, '*b'], fitted: Float[np.ndarray, '*b']) -> float:
    """The norm of the difference over the filters' own; 0 of nothing."""
    size = float(np.linalg.norm(filters))
    return float(np.linalg.norm(fitted - filters)) / size if size else 0.0


def _channel(h: np.ndarray, order: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Poles, one of each conjugate pair, and residues."""
    columns = most_waves(len(h)) + 1
    hankel = np.lib.stride_tricks.sliding_window_view(h, columns)
    energies, vectors = np.linalg.eigh(hankel.T @ hankel)  # singular values squared, ascending
    energies, vectors = np.maximum(energies[::-1], 0), vectors[:, ::-1]
    if not energies[0]:
        return np.zeros(0, complex), np.zeros(0, complex)
    if order:
        rank = min(2 * order, columns - 1)
    else:
        left = np.append(np.cumsum(energies[::-1])[::-1], 0) / np.sum(energies)
        rank = min(max(1, int(np.argmax(left <= tolerance**2))), columns - 1)
    poles = _poles(vectors[:, :rank])
    while order and len(poles) > order:  # a wave without a turn takes a place of its own
        rank -= 1
        poles = _poles(vectors[:, :rank])
    return poles, _residues(h, poles)


def _poles(vectors: np.ndarray) -> np.ndarray:
    found = np.linalg.eigvals(np.linalg.lstsq(vectors[:-1], vectors[1:])[0])
    found = found[(found.imag > 0) | (np.abs(found.imag) < 1e-12)]
    size = np.maximum(np.abs(found), np.exp(-FASTEST))
    found = np.where(np.abs(found) < size, size, found)  # a pole of 0 has no logarithm
    return np.where(size > 1, found / size**2, found)  # one that grows is mirrored


def _residues(h: np.ndarray, poles: np.ndarray) -> np.ndarray:
    powers = poles ** np.arange(len(h))[:, None]
    solved = np.linalg.lstsq(np.concatenate([powers.real, -powers.imag], 1), h, rcond=CUTOFF)[0]
    return solved[: len(poles)] + 1j * solved[len(poles) :]
