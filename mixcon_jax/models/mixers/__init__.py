"""Sequence mixers by the name that a pattern calls them.

To add one: write a class that keeps the contract of ``mixcon_jax.models.layer.Layer`` in a file of its own, and name it
here, by its dotted path, so that a configuration is read and checked without JAX; a class itself may stand here too.
"""

MIXERS: dict[str, str | type] = {
    'attention': 'mixcon_jax.models.mixers.attention.Attention',
    'mamba': 'mixcon_jax.models.mixers.mamba.Mamba',
    'conba': 'mixcon_jax.models.mixers.conba.Conba',
    'mamba2': 'mixcon_jax.models.mixers.mamba2.Mamba2',
    'retnet': 'mixcon_jax.models.mixers.retnet.RetNet',
    'gla': 'mixcon_jax.models.mixers.gla.GLA',
    'rwkv4': 'mixcon_jax.models.mixers.rwkv4.RWKV4',
    'rwkv6': 'mixcon_jax.models.mixers.rwkv6.RWKV6',
    'rwkv7': 'mixcon_jax.models.mixers.rwkv7.RWKV7',
    'moe_mamba': 'mixcon_jax.models.mixers.moe_mamba.MoEMamba',
    'large_kernel': 'mixcon_jax.models.mixers.large_kernel.LargeKernel',
    'hyena': 'mixcon_jax.models.mixers.hyena.Hyena',
    'hyena_modal': 'mixcon_jax.models.mixers.hyena_modal.HyenaModal',
}
