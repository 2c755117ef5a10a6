"""The language model: embedding, stacked pattern blocks scanned over depth, final norm, output head."""

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Int

from mixcon_jax.models.block import Block
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Aux, Parameters, RMSNorm, State, normal


class Decoder(nnx.Module):
    """Decoder-only model (MixCon, §2 and Figure 2) of ``num_blocks`` repeats of a pattern of layers.

    The repeats share one compiled body: their parameters are stacked on a leading ``layers`` axis and scanned.
    """

    def __init__(self, config, params: Parameters) -> None:
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        init, shape = normal(config.init_std), (config.vocab_size, config.dim)
        self.embedding = params('embedding', shape, ('vocab', 'embed'), init)
        self.blocks = nnx.vmap(lambda index: Block(config, params, index))(jnp.arange(config.num_blocks))
        for _, variable in nnx.iter_graph(self.blocks):
            if isinstance(variable, nnx.Variable):
                variable.set_metadata(logical_axes=('layers', *variable.get_metadata()['logical_axes']))
        self.final_norm = RMSNorm(config.dim, params.scope('final_norm'), config.norm_eps, axis='embed')
        if not config.tie_embeddings:
            self.output = params('output', shape[::-1], ('embed', 'vocab'), init)

    def __call__(
        self, tokens: Int[Array, 'b t'], context: Context, state: State | None = None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        """Runs the model on T >= 1 tokens: a training row, a prompt or one decoded token.

        Args:
          tokens: `[B, T]` ids below ``vocab_size``.
          context: documents, positions and mode.
          state: from ``init_state`` or an earlier call; None starts fresh and returns None.

        Returns:
          Hidden features `[B, T, D]` after the final norm, the state, and ``{'losses': means over the layers that have
          one, 'stats': {'layer_j/name': stacked over blocks}}``.
        """
        x = self.embedding[...][tokens].astype(self.dtype)
        graphdef, variables = nnx.split(self.blocks)

        def body(carry: tuple, xs: tuple) -> tuple[tuple, Aux]:
            x, states = carry
            index, variables = xs
            # The states are a carry, not scanned inputs and outputs, so that a decode step updates its caches in place.
            block_state = jax.tree.map(lambda s: jax.lax.dynamic_index_in_dim(s, index, keepdims=False), states)
            x, block_state, aux = nnx.merge(graphdef, variables)(x, context.fold(index), block_state)
            states = jax.tree.map(
                lambda s, new: jax.lax.dynamic_update_index_in_dim(s, new, index, 0), states, block_state
            )
            return (x, states), aux

        if state is None and self.config.remat != 'none':
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.config.remat == 'dots' else None
            body = jax.checkpoint(body, policy=policy)
        blocks = None if state is None else state['blocks']
        (x, blocks), aux = jax.lax.scan(body, (x, blocks), (jnp.arange(self.config.num_blocks), variables))
        aux['losses'] = {name: value.mean() for name, value in aux['losses'].items()}
        return self.final_norm(x), None if state is None else {'blocks': blocks}, aux

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the state before the first token: attention caches of ``max_len`` tokens, all else constant size."""
        graphdef, variables = nnx.split(self.blocks)
        block = nnx.merge(graphdef, jax.tree.map(lambda value: value[0], variables))
        stack = lambda value: jnp.repeat(value[None], self.config.num_blocks, axis=0)
        return {'blocks': jax.tree.map(stack, block.init_state(batch, max_len))}

    def head(self) -> Float[Array, 'd v']:
        """Returns the output weights, float32."""
        return self.embedding[...].T if self.config.tie_embeddings else self.output[...]

    def logits(self, hidden: Float[Array, '*b d']) -> Float[Array, '*b v']:
        """Returns float32 logits; for few tokens, as training never forms them for all."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.matmul(hidden, self.head().astype(hidden.dtype), preferred_element_type=wide)


def create(config, seed: int | Int[Array, ''] = 0) -> Decoder:
    """Builds a decoder from ``config.model``; pure in ``seed``, so ``nnx.eval_shape`` may run it."""
    # Frozen, so that the model's structure is hashable and may be a static argument of a jitted function.
    return Decoder(ml_collections.FrozenConfigDict(config), Parameters(jax.random.key(seed)))
