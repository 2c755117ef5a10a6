"""Matrix product of sorted row groups with one matrix each, for mixtures of experts."""

from kernels_pallas.grouped_matmul.api import grouped_matmul

__all__ = ['grouped_matmul']
