"""Kernels of MixCon-JAX: each an api, a sequential reference and one file a backend; they import only JAX."""
