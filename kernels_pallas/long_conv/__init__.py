"""A causal convolution as long as the sequence, of every document of a row by itself."""

from kernels_pallas.long_conv.api import long_conv

__all__ = ['long_conv']
