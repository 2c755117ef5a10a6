"""What every layer knows about its tokens, besides their features."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Documents, positions and mode of a batch of tokens.

    A row may pack several documents, and may be padded after its last token and before its very first one. Padding
    takes no part in routing, statistics or states. A call that continues an earlier one (with a state) continues its
    positions and segment ids.

    Attributes:
      segment_ids: `[B, T]`, the token's document within its row, from 1; 0 is padding.
      positions: `[B, T]`, the token's place within its document; 0 starts a document.
      rng: key of the layer's noise, or None for none.
      train: whether this is a training step.
    """

    segment_ids: Int[Array, 'b t']
    positions: Int[Array, 'b t']
    rng: PRNGKeyArray | None = None
    train: bool = dataclasses.field(default=False, metadata={'static': True})

    @property
    def mask(self) -> Bool[Array, 'b t']:
        """The real, unpadded tokens."""
        return self.segment_ids > 0

    @property
    def reset(self) -> Bool[Array, 'b t']:
        """The first token of each document."""
        return (self.positions == 0) & self.mask

    @property
    def rows(self) -> 'Context':
        """Each row as one token, which is real if any of its tokens is."""
        real = self.mask.any(axis=1, keepdims=True).astype(jnp.int32)
        return Context(real, jnp.zeros_like(real))

    def fold(self, data: int | Int[Array, '']) -> 'Context':
        """Returns a context whose noise is independent of this one's."""
        return self if self.rng is None else dataclasses.replace(self, rng=jax.random.fold_in(self.rng, data))

    @staticmethod
    def whole(batch: int, length: int, start: int | Int[Array, ''] = 0) -> 'Context':
        """Rows that each are one document without padding, from position ``start``."""
        shape = (batch, length)
        positions = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), shape)
        return Context(segment_ids=jnp.ones(shape, jnp.int32), positions=positions)
