"""A model of Hyena layers as one of modal layers: filters fitted by damped waves, all other weights as they are."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mixcon_jax import config as configs
from mixcon_jax.distillation import modes
from mixcon_jax.errors import UserError
from mixcon_jax.models import pattern
from mixcon_jax.models.decoder import Decoder
from mixcon_jax.models.layers import Buffer
from mixcon_jax.trees import Tree, from_state

FROM, TO, NAME = 'hyena', 'hyena_modal', 'distilled'  # kinds, and what a pattern calls a layer that had no name
NETWORK = ('filter_', 'frequency')  # how the parameters begin that make an implicit filter


@dataclasses.dataclass(frozen=True)
class Fit:
    """How near waves come to one long filter.

    Attributes:
      layer: index in the whole model.
      index: of the long filter in the layer, from 0.
      states: waves of the channel that has most.
      error: norm of the difference over that of the filter, all channels together.
      worst: the same of the channel with the largest.
    """

    layer: int
    index: int
    states: int
    error: float
    worst: float


def hyena_layers(model: ml_collections.ConfigDict) -> dict[int, pattern.Part]:
    """The Hyena mixers of a pattern, by the layer's index in it.

    Raises:
      UserError: there are none.
    """
    mixers = {j: pattern.parts(model, text)['mixer'] for j, text in enumerate(model.pattern)}
    found = {j: part for j, part in mixers.items() if part.kind == FROM}
    if not found:
        raise UserError(f'no layer of the pattern {", ".join(model.pattern)} is a {FROM}: there is nothing to distill')
    return found


def distilled(
    model: Decoder, config: ml_collections.ConfigDict, order: int, tolerance: float
) -> tuple[ml_collections.ConfigDict, dict[str, Tree], list[Fit]]:
    """Fits every long filter of a model.

    Args:
      model: the decoder.
      config: the whole configuration, resolved.
      order, tolerance: as of ``modes.fit``.

    Returns:
      The configuration with modal layers, ``{'params': nested dicts, 'buffers': nested dicts}`` for it, and the fits,
      layer by layer. Layers that a pattern calls alike have as many modes.
    """
    layers, fits = hyena_layers(config.model), []
    found: dict[int, list[list[modes.Modes]]] = {}  # of a layer of the pattern, for each block and filter
    for j in layers:
        graphdef, variables = nnx.split(model.blocks.layers[j].mixer)
        found[j] = []
        for block in range(config.model.num_blocks):
            mixer = nnx.merge(graphdef, jax.tree.map(lambda value, block=block: value[block], variables))
            taps = np.asarray(mixer.taps(mixer.options.max_len), np.float64)
            found[j].append([modes.fit(h, order, tolerance) for h in taps])
            for index, (h, fitted) in enumerate(zip(taps, found[j][-1], strict=True)):
                near = fitted.filters(len(h))
                worst = max(modes.error(a, b) for a, b in zip(h.T, near.T, strict=True))
                place = block * len(config.model.pattern) + j
                fits.append(Fit(place, index, len(fitted.rate), modes.error(h, near), worst))
    sizes = {  # by the name that a pattern has for them
        part.name: max(len(fitted.rate) for other in layers if layers[other].name == part.name
                       for block in found[other] for fitted in block)
        for part in layers.values()
    }  # fmt: skip
    _, *states = nnx.split(model, nnx.Param, Buffer)
    params, buffers = (copy.deepcopy(from_state(state)) for state in states)
    for j, part in layers.items():
        mixer = params['blocks']['layers'][str(j)]['mixer']
        for name in [name for name in mixer if name.startswith(NETWORK)]:
            del mixer[name]
        mixer.update(_stacked(found[j], sizes[part.name]))
    return (
        _modal(config, layers, sizes),
        {'params': params, 'buffers': buffers},
        sorted(fits, key=lambda fit: fit.layer),
    )


def _stacked(found: list[list[modes.Modes]], states: int) -> dict[str, Float[Array, '...']]:
    """The parameters of modal layers [blocks, filters, ...], with waves of nothing where a filter has fewer."""

    def stack(of: Callable[[modes.Modes], np.ndarray], rest: float) -> Float[Array, '...']:
        def full(x: np.ndarray) -> np.ndarray:
            missing = [(0, states - x.shape[i]) if i == x.ndim - 2 else (0, 0) for i in range(x.ndim)]
            return np.pad(x, missing, constant_values=rest)

        return jnp.asarray([[full(of(fitted)) for fitted in block] for block in found], jnp.float32)

    return {
        'decay': stack(lambda fitted: fitted.rate + np.log(-np.expm1(-fitted.rate)), 0.0),  # whose softplus is the rate
        'angle': stack(lambda fitted: fitted.angle, 0.0),
        'residue': stack(lambda fitted: fitted.residue, 0.0),
    }


def _modal(
    config: ml_collections.ConfigDict, layers: dict[int, pattern.Part], sizes: dict[str, int]
) -> ml_collections.ConfigDict:
    """The configuration with modal layers in place of Hyena's, each with a name and options of its own."""
    values: dict[str, Any] = config.to_dict()
    model, texts = values['model'], list(config.model.pattern)
    fresh = next(name for name in (NAME, *(f'{NAME}{i}' for i in range(len(texts)))) if name not in model['layers'])
    for j, part in layers.items():
        name, options = fresh if part.name == FROM else part.name, part.model.hyena
        texts[j] = name + texts[j].removeprefix(part.name)
        model['layers'][name] = {
            'kind': TO, 'order': options.order, 'd_conv': options.d_conv, 'd_state': sizes[part.name],
        }  # fmt: skip
    model['pattern'] = tuple(texts)
    return configs.validate(configs.from_dict(values))
