"""The contract of mixers and FFNs: all that the rest of the program knows of a layer."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Aux, Parameters, State
from mixcon_jax.models.published import Published
from mixcon_jax.options import Option, Statistic


class Layer(nnx.Module):
    """A mixer or an FFN: one call for training, prefill and decoding, and what must be known to plan with it.

    ``OPTIONS``, ``STATISTICS``, ``check`` and ``check_split`` describe the class to whoever reads a configuration,
    which must not load JAX: they are read from the source of the class (``mixcon_jax.models.declared``), so they may
    use literals, the standard library, ``mixcon_jax.options`` and ``mixcon_jax.checks``. A subclass adds to those of
    its bases, but ``PUBLISHED`` takes the place of theirs.

    Args:
      config: ``config.model``, resolved; of a part that a pattern calls by a name of ``model.layers``, with the options
        of that name.
      params: makes the parameters.
      num_layers: layers of the whole model, for the scale of the output projection.

    Attributes:
      OPTIONS: the groups of options that the class adds below ``config.model``, ``{group: {name: Option}}``.
      STATISTICS: ``{name: Statistic}`` of what a call reports.
      PUBLISHED: what published checkpoints call the layer and its weights, ``{architecture: Published}``, by the
        ``model_type`` of Hugging Face transformers.
    """

    OPTIONS: ClassVar[Mapping[str, Mapping[str, Option]]] = {}
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    PUBLISHED: ClassVar[Mapping[str, Published]] = {}

    # ----- of the class: what a configuration makes of it -----
    @staticmethod
    def check(model) -> None:
        """Refuses options of ``config.model``, not yet resolved, that do not go together.

        It runs where a pattern has the layer, after its bases' own.

        Raises:
          ConfigError: names the key.
        """

    @staticmethod
    def check_split(model, shards: Mapping[str, int]) -> None:
        """Refuses options of ``config.model``, resolved, that a mesh cannot share out; it runs as ``check`` does.

        Args:
          model: ``config.model``.
          shards: into how many parts the mesh splits each logical axis: ``{'heads': 2, 'experts': 4, ...}``; and
            ``'apart'``, how many groups of devices see rows of their own alone (``checks.not_apart``).

        Raises:
          ConfigError: names the key.
        """

    @classmethod
    @abc.abstractmethod
    def flops(cls, model, seq_len: int) -> float:
        """Forward operations of one token beside its matrix products, which are counted by themselves: 0 for none.

        Args:
          model: ``config.model``, resolved.
          seq_len: tokens of a row.
        """

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """Exponentials of one token, forward and backward, beside those of gates and norms: by them a GPU may be bound.

        Args:
          model: ``config.model``, resolved.
          seq_len: tokens of a row.
        """
        del model, seq_len
        return 0.0, 0.0

    @classmethod
    def active_share(cls, model, parameter: str) -> float:
        """The share of a parameter that one token uses; ``parameter`` is its name within the layer."""
        del model, parameter
        return 1.0

    @classmethod
    def without_additions(cls, model) -> Any:
        """``config.model`` of the layer that this one extends, against which its additions are counted; else None."""
        del model

    @classmethod
    def merge(cls, model, weights: Mapping[str, Array]) -> tuple[Mapping[str, Any], Mapping[str, Array]] | None:
        """A smaller layer that computes the same, for ``mixcon merge``; None where there is none.

        Args:
          model: ``config.model``, resolved.
          weights: the layer's parameters, by their names within it.

        Returns:
          The options in which it differs, and its parameters.
        """
        del model, weights
        return None

    # ----- of the layer -----
    @abc.abstractmethod
    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        pass

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns what decoding carries from call to call, before the first token; nothing if not overridden.

        Args:
          batch: rows.
          max_len: tokens that a row may have, for states that grow with them.
        """
        del batch, max_len
        return {}

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        """Runs the layer on T >= 1 tokens.

        Args:
          x: `[B, T, D]`.
          context: documents, positions and mode.
          state: None starts fresh and returns None; else of ``init_state`` or an earlier call.

        Returns:
          The output, the state, and ``{'losses': {name: Loss}, 'stats': {name: array}}``, either left out if empty;
          ``mixcon_jax.models.reported`` says which names are free, and what metrics call them.
        """

    def update_buffers(self, buffers: Mapping[str, Any], stats: Mapping[str, Array]) -> Mapping[str, Any]:
        """Returns the layer's new buffers after a training step.

        Args:
          buffers: the values of its ``layers.Buffer`` variables, by name.
          stats: of the statistics that the class declares, those that its call reported, as the mean over the
            microbatches of the step.
        """
        del stats
        return buffers
