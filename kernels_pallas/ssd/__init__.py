"""State space duality: a matrix state that decays by head and step, or by key dimension too, in chunks of products."""

from kernels_pallas.ssd.api import ssd

__all__ = ['ssd']
