"""Context-parallel forms: each shard holds a slice of the tokens, and gets what one device would compute for it.

To be called inside `jax.shard_map` that is manual over the axis sharing out the sequence (other axes may stay with
XLA), with arrays of tokens split along time and all others whole on every shard:

    split, whole = PartitionSpec(None, 'context'), PartitionSpec()
    jax.shard_map(scan, in_specs=(split, ..., whole), out_specs=(split, whole), axis_names={'context'}, check_vma=False)

Every recurrence here takes the state before a slice to the state after it by an affine map. A first pass finds the map
without keeping outputs, `exchange` gives each shard its entering state, a second pass is the plain function from there.
Both passes are the package's own single-device functions, in whatever implementation is asked for. A kernel's form lies
in its own folder.
"""

from kernels_pallas.adaptive_gain.context_parallel import diagonal_gain, matrix_gain
from kernels_pallas.attention.context_parallel import attention
from kernels_pallas.causal_conv1d.context_parallel import causal_conv1d
from kernels_pallas.exchange import previous
from kernels_pallas.selective_scan.context_parallel import selective_scan

__all__ = ['attention', 'causal_conv1d', 'diagonal_gain', 'matrix_gain', 'previous', 'selective_scan']
