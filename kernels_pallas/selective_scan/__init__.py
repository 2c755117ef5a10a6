"""Selective scan (S6): the input-dependent diagonal recurrence of Mamba and Conba."""

from kernels_pallas.selective_scan.api import PADDED_DT, selective_scan

__all__ = ['PADDED_DT', 'selective_scan']
