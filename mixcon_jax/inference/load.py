"""A trained model, put together from a run directory, for evaluation and sampling."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax.data import tokenizer as tokenizers
from mixcon_jax.errors import UserError
from mixcon_jax.host.compilation import keep_compiled, make_cpu_devices
from mixcon_jax.host.paths import expand_folder
from mixcon_jax.models import decoder, pattern
from mixcon_jax.models.layers import Buffer
from mixcon_jax.parallel import axes, layout
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.parallel.rules import Place
from mixcon_jax.runs.checkpoints import Meta
from mixcon_jax.runs.mark import path_of
from mixcon_jax.runs.weights import load_params
from mixcon_jax.trees import from_state, logical_axes, named_leaves, to_state


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model and tokenizer, with the configuration they were trained under."""

    model: decoder.Decoder
    tokenizer: tokenizers.Tokenizer
    config: ml_collections.ConfigDict
    step: int
    data: tuple[str, ...]  # fingerprints of the token stores that it was trained on
    place: Place | None = None  # the mesh that its parameters are shared out over; None is one device


def load_model(workdir: str | Path, step: int | str | None = None, mesh: Sequence[str] = ()) -> TrainedModel:
    """Loads a run's model onto the first device, or over the devices of a mesh, each its own part.

    Args:
      workdir: a run directory.
      step: a checkpoint's step, ``'best'`` or None for the newest intact one.
      mesh: overrides such as ``mesh.fsdp=2``, whatever mesh the run had; none is the first device or, of several
        processes, ``mesh.data`` over all.

    Raises:
      UserError: no such run or checkpoint, one whose arrays don't fit its configuration, or a mesh that does not take
        all devices or divide what it splits.
    """
    workdir = expand_folder(path_of(workdir))
    if not workdir.is_dir():
        raise UserError(f'workdir {workdir} does not exist; give the folder that `mixcon train --workdir` wrote')
    options = configs.mesh_of(mesh)
    make_cpu_devices(options.cpu_devices)
    shared = bool(mesh) or jax.process_count() > 1
    place = Place(make_mesh(options), tuple(axes.rules(options).items())) if shared else None
    trees, meta = load_params(workdir, step, (lambda meta, shapes: _shardings(meta, place)) if place else None)
    config = _config_of(meta, place)
    keep_compiled(config)
    graphdef, params, buffers = nnx.split(decoder.abstract(config.model), nnx.Param, Buffer)  # type: ignore[misc]
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
    return TrainedModel(nnx.merge(graphdef, *states), tokenizer, config, meta.step, meta.data, place)


def _config_of(meta: Meta, place: Place | None) -> ml_collections.ConfigDict:
    """A checkpoint's configuration; on a mesh no token is dropped, so that results are those of one device."""
    config = configs.resolve(configs.from_dict(meta.config))
    if place:
        drop_no_token(config.model)
    return config


def drop_no_token(model: ml_collections.ConfigDict) -> None:
    """Gives exchanges between experts of ``config.model`` room for all."""
    for options in (model.moe, *model.get('layers', {}).values()):
        if 'capacity' in options:
            options.capacity = 0.0
        if 'exchange' in options:
            options.exchange = 'padded'


def _shardings(meta: Meta, place: Place) -> dict[str, Any]:
    """Where every array of a checkpoint lies on a mesh, by name.

    Raises:
      ConfigError: the mesh cannot share out an option of the model.
    """
    config = _config_of(meta, place)
    pattern.check_split(config.model, axes.shards(place.rules, place.mesh.shape))
    _, params, buffers = nnx.split(decoder.abstract(config.model), nnx.Param, Buffer)  # type: ignore[misc]
    trees = {
        'params': layout.param_shardings(from_state(params), logical_axes(params), place.mesh, place.rules),
        'buffers': jax.tree.map(lambda _: layout.replicated(place.mesh), from_state(buffers)),
    }
    return named_leaves(trees)
