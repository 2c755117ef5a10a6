"""Kernels of MixCon-JAX: each an api, a sequential reference, a file a backend; they import JAX and jaxtyping alone.

``from kernels_pallas.selective_scan import selective_scan``; the others likewise, from the packages of their names.
"""
