"""Causal depthwise convolution over packed documents: a short filter with SiLU, or dilated taps added to the input."""

from kernels_pallas.causal_conv1d.api import causal_conv1d, past_reach

__all__ = ['causal_conv1d', 'past_reach']
