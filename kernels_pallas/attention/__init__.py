"""Causal grouped-query attention over packed documents."""

from kernels_pallas.attention.api import attention

__all__ = ['attention']
