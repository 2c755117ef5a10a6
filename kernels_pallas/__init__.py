"""Kernels of MixCon-JAX: each an api, a sequential reference and one file a backend; they import only JAX.

`from kernels_pallas import selective_scan` is the function; the other kernels are in the packages of their names.
"""

from kernels_pallas.selective_scan import selective_scan

__all__ = ['selective_scan']
