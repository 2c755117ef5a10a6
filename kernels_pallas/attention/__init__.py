"""Causal grouped-query attention over packed documents."""

from kernels_pallas.attention.api import attention
from kernels_pallas.attention.xla import whole_tiles

__all__ = ['attention', 'whole_tiles']
