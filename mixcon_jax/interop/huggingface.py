"""Weights of Hugging Face transformers under our names and in our layout.

What a layer's weights are called there stands in the layer's class (``Layer.PUBLISHED``); here stands what belongs to
no layer: the embedding, the norms and the head. The maps only rename, transpose, split and stack, so the same function
carries a gradient over.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mixcon_jax.errors import UserError
from mixcon_jax.models import kinds, pattern
from mixcon_jax.models.published import Place, Published, Weights, linear, same


class Architecture(NamedTuple):
    """What a published model has beside its layers.

    Attributes:
      top: ``{name: what makes ours of it}`` of the weights outside the decoder layers.
      norms: what it calls a decoder layer's norms, by our names.
    """

    top: Mapping[str, Place]
    norms: Mapping[str, str]


HEAD = 'lm_head.weight'  # of a model whose head is not its embedding
NORM: dict[str, Place] = {'weight': same('scale')}  # of a norm alone
SHARED = {'model.embed_tokens.weight': same('embedding'), HEAD: linear('output')}
LLAMA = Architecture(
    SHARED | {'model.norm.weight': same('final_norm/scale')},
    {'mixer_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'},
)
# By the model_type of transformers, as in Layer.PUBLISHED.
ARCHITECTURES = {
    'jamba': Architecture(
        SHARED | {'model.final_layernorm.weight': same('final_norm/scale')},
        {'mixer_norm': 'input_layernorm', 'ffn_norm': 'pre_ff_layernorm'},
    ),
    'llama': LLAMA,
    'mixtral': LLAMA,
}


def norm_weights(theirs: Mapping[str, np.ndarray]) -> Weights:
    """Maps the weights of one norm; errors as of ``layer_weights``."""
    return _placed(theirs, NORM, 'a norm')


def layer_weights(theirs: Mapping[str, np.ndarray], kind: str, architecture: str) -> Weights:
    """Maps the weights of one mixer or FFN.

    Args:
      theirs: by their names within the layer.
      kind: the registered name of the layer that is to have them.
      architecture: ``model_type`` of transformers that they come from.

    Returns:
      Arrays by the names of the layer's parameters, in the types they came in.

    Raises:
      UserError: the layer does not say what that architecture calls its weights, or it has no such weight.
    """
    return _placed(theirs, published(kind, architecture).weights, f'the layer {kind!r} from {architecture}')


def published(kind: str, architecture: str, role: str | None = None) -> Published:
    """What an architecture calls a layer and its weights.

    Args:
      kind: the registered name of the layer.
      architecture: ``model_type`` of transformers.
      role: ``'mixer'`` or ``'ffn'``; None looks in both registries.

    Raises:
      UserError: the layer does not say it.
    """
    found = kinds.load(kind, role).PUBLISHED
    if architecture not in found:
        known = f'only in {", ".join(found)}' if found else 'nor in any other; its class has no PUBLISHED'
        raise UserError(f'the layer {kind!r} does not say what its weights are called in {architecture}, {known}')
    return found[architecture]


def model_weights(theirs: Mapping[str, np.ndarray], model, architecture: str) -> Weights:
    """Maps the weights of a whole model; those of layers that one block's repeats share a place in are stacked.

    Args:
      theirs: by their names in transformers.
      model: ``config.model``, whose pattern says which layer takes them.
      architecture: ``model_type`` of transformers.

    Returns:
      Arrays by the names of the model's parameters.

    Raises:
      UserError: an architecture, a layer or a weight that has no place, or a place that has no weight, named.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f'the architecture {architecture!r} is not known; choose from {", ".join(ARCHITECTURES)}')
    top, norms = ARCHITECTURES[architecture]
    top = {name: place for name, place in top.items() if name != HEAD or not model.tie_embeddings}
    layers: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    outside: dict[str, np.ndarray] = {}
    for name, value in theirs.items():
        if match := re.fullmatch(r'model\.layers\.(\d+)\.(\w+)\.(.+)', name):
            layers.setdefault(int(match[1]), {}).setdefault(match[2], {})[match[3]] = value
        else:
            outside[name] = value
    places = [_modules(model, text, norms, architecture) for text in model.pattern]
    count = model.num_blocks * len(places)
    if beyond := [index for index in layers if index >= count]:
        raise UserError(
            f'there is a layer {max(beyond)} from {architecture}, but the model has {count} layers, 0 to {count - 1}:'
            f' model.num_blocks={model.num_blocks} of {len(places)}'
        )
    stacks: dict[str, list[np.ndarray]] = {}
    for index in range(count):
        j, found = index % len(places), layers.get(index, {})
        where = f'layer {index} ({model.pattern[j]}) from {architecture}'
        for module in found:
            if module not in places[j]:
                raise UserError(f'{where} has no place for {module}, only for {", ".join(places[j])}')
        for module, (ours, known) in places[j].items():
            what = f'{module} of {where}'
            for name, value in _whole(found.get(module, {}), known, what).items():
                stacks.setdefault(f'blocks/layers/{j}/{ours}/{name}', []).append(value)
    stacked = {name: np.stack(values) for name, values in stacks.items()}
    return _whole(outside, top, f'a model from {architecture}') | stacked


def _modules(
    model, text: str, norms: Mapping[str, str], architecture: str
) -> dict[str, tuple[str, Mapping[str, Place]]]:
    """Our part, and what its weights are called, for each module of a published decoder layer."""
    parts = pattern.parts(model, text)
    normed = ['mixer_norm']
    if 'ffn' in parts and not pattern.parse_layer(text, pattern.named_kinds(model)).parallel:  # which share one
        normed.append('ffn_norm')
    found: dict[str, tuple[str, Mapping[str, Place]]] = {norms[ours]: (ours, NORM) for ours in normed}
    for role, part in parts.items():
        module, weights = published(part.kind, architecture, role)
        found[module] = (role, weights)
    return found


def _whole(theirs: Mapping[str, np.ndarray], places: Mapping[str, Place], what: str) -> Weights:
    """``_placed``, where every place must have its weight."""
    ours = _placed(theirs, places, what)
    if missing := [name for name in places if name not in theirs]:
        raise UserError(f'{what} lacks {", ".join(missing)}')
    return ours


def _placed(theirs: Mapping[str, np.ndarray], places: Mapping[str, Place], what: str) -> Weights:
    ours: Weights = {}
    for name, value in theirs.items():
        if name not in places:
            raise UserError(f'{what} has no place for the weight {name}, only for {", ".join(places)}')
        ours |= places[name](value)
    return ours
