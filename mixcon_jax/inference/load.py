"""A trained model, put together from a run directory, for evaluation and sampling."""

import dataclasses
from pathlib import Path

import ml_collections
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax.data import tokenizer as tokenizers
from mixcon_jax.errors import UserError
from mixcon_jax.host.compilation import keep_compiled
from mixcon_jax.host.paths import expand_folder
from mixcon_jax.models import decoder
from mixcon_jax.models.layers import Buffer
from mixcon_jax.runs.mark import path_of
from mixcon_jax.runs.weights import load_params
from mixcon_jax.trees import named_leaves, to_state


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model and tokenizer, with the configuration they were trained under."""

    model: decoder.Decoder
    tokenizer: tokenizers.Tokenizer
    config: ml_collections.ConfigDict
    step: int
    data: tuple[str, ...]  # fingerprints of the token stores that it was trained on


def load_model(workdir: str | Path, step: int | str | None = None) -> TrainedModel:
    """Loads a run's model onto the first device.

    Args:
      workdir: a run directory.
      step: a checkpoint's step, ``'best'`` or None for the newest intact one.

    Raises:
      UserError: no such run or checkpoint, or one whose arrays don't fit its configuration.
    """
    workdir = expand_folder(path_of(workdir))
    if not workdir.is_dir():
        raise UserError(f'workdir {workdir} does not exist; give the folder that `mixcon train --workdir` wrote')
    trees, meta = load_params(workdir, step)
    config = configs.resolve(configs.from_dict(meta.config))
    keep_compiled(config)
    abstract = nnx.eval_shape(lambda: decoder.create(config.model))
    graphdef, params, buffers = nnx.split(abstract, nnx.Param, Buffer)  # type: ignore[misc]
    states = []
    for kind, template in (('params', params), ('buffers', buffers)):
        wanted = {'/'.join(map(str, path)): value.shape for path, value in nnx.to_flat_state(template)}
        found = {name: leaf.shape for name, leaf in named_leaves(trees[kind]).items()}
        if wanted != found:
            name = next(name for name in sorted(wanted | found) if wanted.get(name) != found.get(name))
            raise UserError(
                f'checkpoint {meta.step} of {workdir} has {name} of shape {found.get(name, "none")}, '
                f'its configuration wants {wanted.get(name, "none")}'
            )
        states.append(to_state(trees[kind], template))
    tokenizer = tokenizers.from_json(meta.tokenizer, f'the tokenizer of checkpoint {meta.step}')
    return TrainedModel(nnx.merge(graphdef, *states), tokenizer, config, meta.step, meta.data)
