"""Causal depthwise convolution with a kernel of tens to hundreds of lags, over packed documents."""

from kernels_pallas.long_conv.api import long_conv

__all__ = ['long_conv']
