"""Kernels of MixCon-JAX: each an api, a sequential reference and one file a backend; they import only JAX and jaxtyping.

``from kernels_pallas.selective_scan import selective_scan``; the others likewise, from the packages of their names.
"""
