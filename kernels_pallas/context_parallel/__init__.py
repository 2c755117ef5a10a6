"""Recurrences, convolutions and attention over a sequence that a mesh axis shares out."""

from kernels_pallas.context_parallel.api import attention, diagonal_gain, matrix_gain, previous, selective_scan

__all__ = ['attention', 'diagonal_gain', 'matrix_gain', 'previous', 'selective_scan']
