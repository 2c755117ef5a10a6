"""The language model: embedding, stacked pattern blocks scanned over depth, final norm, output head."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from kernels_pallas import platform
from mixcon_jax.models.block import Block
from mixcon_jax.models.context import Context
from mixcon_jax.models.embedding import lookup
from mixcon_jax.models.layers import Aux, Parameters, State, normal, stream_norm
from mixcon_jax.models.pattern import resolve
from mixcon_jax.parallel.layout import stream

POLICIES = {'block': None, 'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


WRITTEN_OUT = 32  # layers at most, unless model.unroll says so


def written_out(config) -> int:
    """Blocks in one round of the loop over them: what ``config.unroll`` says, or by the device and their number.

    A loop stacks what the backward pass needs over its rounds, from a copy of the round's own. Compiled for an H100, 16
    dense layers of 856M parameters take 34.4 GiB as a loop of 2 blocks, 30.9 of 4, 28.2 of 16, and 25.3 written out;
    the compiler takes 15, 11, 9 and 16 to 20 CPU seconds (tests/benchmarks/compiled_step.py). On a CPU all stays one
    loop, which compiles fastest and keeps the bits of earlier runs.
    """
    if config.unroll:
        return min(config.unroll, config.num_blocks)
    layers = config.num_blocks * len(config.pattern)
    return config.num_blocks if platform.platform() == 'gpu' and layers <= WRITTEN_OUT else 1


def embedding_gradient(config) -> str:
    """What ``config.embedding_gradient`` comes to: 'sorted' or 'scatter'."""
    if config.embedding_gradient != 'auto':
        return config.embedding_gradient
    return 'sorted' if platform.platform() == 'gpu' else 'scatter'


class Decoder(nnx.Module):
    """Decoder-only model (MixCon, §2 and Figure 2) of ``num_blocks`` repeats of a pattern of layers.

    Their parameters are stacked on a leading ``layers`` axis. In training the repeats share one compiled body, scanned
    over them, unless they are few (``written_out``); with a state they are written out.
    """

    def __init__(self, config, params: Parameters) -> None:
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        init, shape = normal(config.init_std), (config.vocab_size, config.dim)
        self.embedding = params('embedding', shape, ('vocab', 'embed'), init, decay=False)
        self.embedding_norm = stream_norm(config, params.scope('embedding_norm')) if config.embedding_norm else None
        self.blocks = nnx.vmap(lambda index: Block(config, params, index))(jnp.arange(config.num_blocks))
        for _, variable in nnx.iter_graph(self.blocks):
            if isinstance(variable, nnx.Variable):
                variable.set_metadata(logical_axes=('layers', *variable.get_metadata()['logical_axes']))
        self.final_norm = stream_norm(config, params.scope('final_norm'))
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
          Hidden features `[B, T, D]` after the final norm, the state, and ``{'losses': {name: Loss}, means over the
          parts of layers that have one, 'stats': stacked over blocks, by their names in metrics}``.
        """
        x = self.embed(tokens)
        graphdef, variables = nnx.split(self.blocks)

        def body(x: Array, xs: tuple) -> tuple[Array, Aux]:
            index, variables = xs
            x, _, aux = nnx.merge(graphdef, variables)(x, context.fold(index), None)
            return x, aux

        if state is None:
            if self.config.remat in POLICIES:  # 'selective' is every layer's own
                body = jax.checkpoint(body, policy=POLICIES[self.config.remat])
            stacked = jnp.arange(self.config.num_blocks), variables
            x, aux = jax.lax.scan(body, x, stacked, unroll=written_out(self.config))
        else:
            # Written out block by block: a loop would take every cache out of the stack and put it back, each token.
            blocks, auxes = [], []
            for index, block_state in enumerate(state['blocks']):
                block = nnx.merge(graphdef, jax.tree.map(lambda value, index=index: value[index], variables))
                x, block_state, aux = block(x, context.fold(index), block_state)
                blocks.append(block_state)
                auxes.append(aux)
            state, aux = {'blocks': blocks}, jax.tree.map(lambda *values: jnp.stack(values), *auxes)
        aux['losses'] = jax.tree.map(jnp.mean, aux['losses'])
        return stream(self.final_norm(x)), state, aux

    def embed(self, tokens: Int[Array, 'b t']) -> Float[Array, 'b t d']:
        """Returns the features that the first block reads."""
        x = stream(lookup(self.embedding[...], tokens, self.dtype, embedding_gradient(self.config)))
        return x if self.embedding_norm is None else stream(self.embedding_norm(x))

    def block(self, index: int | Int[Array, '']) -> Block:
        """Returns one repeat of the pattern, with its own part of the stacked parameters."""
        graphdef, variables = nnx.split(self.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda value: value[index], variables))

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the state before the first token: attention caches of ``max_len`` tokens, all else constant size."""
        # Of each block's own: a state may hold what is computed of the weights once, such as Hyena's filters.
        return {'blocks': [self.block(i).init_state(batch, max_len) for i in range(self.config.num_blocks)]}

    def update_buffers(self, buffers: Mapping[str, Any], stats: Mapping[str, Array]) -> dict[str, Any]:
        """Returns the buffers after a training step, each layer's as the layer says.

        Args:
          buffers: nested dicts ``{'blocks': {'layers': {'j': ...}}}`` of arrays `[num_blocks, ...]`; empty if none.
          stats: `[num_blocks, ...]` by their names in metrics, the mean over microbatches.
        """
        return {name: jax.vmap(self.blocks.update_buffers)(values, stats) for name, values in buffers.items()}

    def head(self) -> Float[Array, 'd v']:
        """Returns the output weights, float32."""
        return self.embedding[...].T if self.config.tie_embeddings else self.output[...]

    def logits(self, hidden: Float[Array, '*b d']) -> Float[Array, '*b v']:
        """Returns float32 logits; for few tokens, as training never forms them for all."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.matmul(hidden, self.head().astype(hidden.dtype), preferred_element_type=wide)


def create(config, seed: int | Int[Array, ''] = 0) -> Decoder:
    """Builds a decoder from ``config.model``, resolved or not; pure in ``seed``, so ``nnx.eval_shape`` may run it."""
    return _decoder(config, jax.random.key(seed))


def abstract(config) -> Decoder:
    """The decoder of ``config.model`` without arrays: its structure, and what each parameter and buffer is like."""
    return nnx.eval_shape(lambda: _decoder(config, None))


def _decoder(config, key: PRNGKeyArray | None) -> Decoder:
    # Frozen, so that the model's structure is hashable and may be a static argument of a jitted function.
    return Decoder(ml_collections.FrozenConfigDict(resolve(config)), Parameters(key))
