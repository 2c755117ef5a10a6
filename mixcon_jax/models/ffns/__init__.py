"""Channel mixers (FFNs) by the name that a pattern calls them."""

from mixcon_jax.models.ffns.mlp import MLP
from mixcon_jax.models.ffns.moe import MoE

FFNS = {'mlp': MLP, 'moe': MoE}
