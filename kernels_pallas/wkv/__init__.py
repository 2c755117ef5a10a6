"""RWKV-4's weighted mean of values: a sum with exponential weights, kept apart from its largest exponent."""

from kernels_pallas.wkv.api import wkv
from kernels_pallas.wkv.reference import EMPTY, EXPONENTIALS, OPERATIONS

__all__ = ['EMPTY', 'EXPONENTIALS', 'OPERATIONS', 'wkv']
