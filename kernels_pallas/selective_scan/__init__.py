"""Selective scan (S6): the input-dependent diagonal recurrence of Mamba and Conba."""

from kernels_pallas.selective_scan.api import selective_scan

__all__ = ['selective_scan']
