"""A causal convolution whose filter is a sum of damped waves: one complex state a wave in place of the past."""

from kernels_pallas.modal_conv.api import modal_conv

__all__ = ['modal_conv']
