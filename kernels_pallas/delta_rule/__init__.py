"""The generalised delta rule: a matrix state that decays by key, forgets along one direction and takes in another."""

from kernels_pallas.delta_rule.api import delta_rule

__all__ = ['delta_rule']
