"""Adaptive feedback gain of Conba: a gated delta rule whose key and value are the normalised tracking error."""

from kernels_pallas.adaptive_gain.api import diagonal_gain, matrix_gain

__all__ = ['diagonal_gain', 'matrix_gain']
