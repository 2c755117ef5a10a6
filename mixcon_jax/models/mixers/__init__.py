"""Sequence mixers by the name that a pattern calls them.

To add one: write a class with Attention's contract in a file of its own and name it here.
"""

from mixcon_jax.models.mixers.attention import Attention
from mixcon_jax.models.mixers.conba import Conba
from mixcon_jax.models.mixers.mamba import Mamba

MIXERS = {'attention': Attention, 'mamba': Mamba, 'conba': Conba}
