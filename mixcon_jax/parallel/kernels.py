"""The kernels as layers call them: each device computes its own rows, tokens and heads of what the mesh shares out.

Where a sequence is shared out, ``causal_conv1d`` and ``long_conv`` return None for the state after it.
"""

from kernels_pallas.adaptive_gain.context_parallel import DIAGONAL, MATRIX
from kernels_pallas.attention.context_parallel import CALL as ATTENTION
from kernels_pallas.causal_conv1d.context_parallel import CALL as CAUSAL_CONV1D
from kernels_pallas.delta_rule.context_parallel import CALL as DELTA_RULE
from kernels_pallas.long_conv.context_parallel import CALL as LONG_CONV
from kernels_pallas.modal_conv.context_parallel import CALL as MODAL_CONV
from kernels_pallas.selective_scan.context_parallel import CALL as SELECTIVE_SCAN
from kernels_pallas.ssd.context_parallel import CALL as SSD
from kernels_pallas.wkv.context_parallel import CALL as WKV
from mixcon_jax.parallel.split import split

attention = split(ATTENTION)
causal_conv1d = split(CAUSAL_CONV1D)
delta_rule = split(DELTA_RULE)
diagonal_gain = split(DIAGONAL)
long_conv = split(LONG_CONV)
matrix_gain = split(MATRIX)
modal_conv = split(MODAL_CONV)
selective_scan = split(SELECTIVE_SCAN)
ssd = split(SSD)
wkv = split(WKV)
