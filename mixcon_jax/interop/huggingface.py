"""Weights of Hugging Face transformers under our names and in our layout, and ours under theirs.

What a layer's weights are called there stands in the layer's class (``Layer.PUBLISHED``); here stands what belongs to
no layer: the embedding, the norms and the head. The maps only rename, transpose, split and stack, so the same functions
carry a gradient over.
"""

import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mixcon_jax.errors import UserError
from mixcon_jax.models import kinds, pattern
from mixcon_jax.models.published import Place, Published, Weights, linear, same

MATRICES = ('gate_proj', 'up_proj', 'down_proj')  # of an expert, in most files


class Architecture(NamedTuple):
    """What a published model has beside its layers.

    Attributes:
      body: what it calls all but the head.
      embedding, final_norm: what it calls these, below the body.
      norms: what it calls a decoder layer's norms, by our names.
      layers: what it calls its decoder layers, below the body.
      embedding_norm: what it calls the norm after the embedding, below the body, if it has one.
      head: the weight of a head that is not the embedding.
      files: what checkpoints' files call modules otherwise than the modules do.
      matrices: what files call the three matrices of an expert, in the order of MATRICES.
    """

    body: str
    embedding: str
    final_norm: str
    norms: Mapping[str, str]
    layers: str = 'layers'
    embedding_norm: str = ''
    head: str = 'lm_head.weight'
    files: Mapping[str, str] = types.MappingProxyType({})
    matrices: tuple[str, ...] = MATRICES

    def top(self, model) -> dict[str, Place]:
        """The places, by their names, of the weights outside the decoder layers of ``config.model``."""
        norms = {'final_norm': self.final_norm}
        if model.embedding_norm:
            norms['embedding_norm'] = self.embedding_norm
        placed = {
            f'{self.body}.{theirs}.{weight}': place
            for ours, theirs in norms.items()
            for weight, place in _norm(model.norm, f'{ours}/').items()
        }
        head = {} if model.tie_embeddings else {self.head: linear('output')}
        return {f'{self.body}.{self.embedding}.weight': same('embedding')} | placed | head


NORM_WEIGHTS = {
    'rms': {'weight': 'scale'},
    'layer': {'weight': 'scale', 'bias': 'bias'},
}  # by model.norm
MAMBA = Architecture('backbone', 'embeddings', 'norm_f', {'mixer_norm': 'norm'})
JAMBA = Architecture(
    'model', 'embed_tokens', 'final_layernorm', {'mixer_norm': 'input_layernorm', 'ffn_norm': 'pre_ff_layernorm'}
)
LLAMA = Architecture(
    'model', 'embed_tokens', 'norm', {'mixer_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'}
)
MIXTRAL = LLAMA._replace(files={'mlp': 'block_sparse_moe'}, matrices=('w1', 'w3', 'w2'))
RWKV = Architecture(
    'rwkv', 'embeddings', 'ln_out', {'mixer_norm': 'ln1', 'ffn_norm': 'ln2'}, 'blocks', 'blocks.0.pre_ln', 'head.weight'
)
# By the model_type of transformers, as in Layer.PUBLISHED.
ARCHITECTURES = {
    'bamba': JAMBA,
    'falcon_mamba': MAMBA,
    'jamba': JAMBA,
    'llama': LLAMA,
    'mamba': MAMBA,
    'mamba2': MAMBA,
    'mixtral': MIXTRAL,
    'rwkv': RWKV,
}


def norm_weights(theirs: Mapping[str, np.ndarray]) -> Weights:
    """Maps the weights of one RMSNorm; errors as of ``layer_weights``."""
    return _placed(theirs, _norm('rms'), 'a norm', None)


def layer_weights(theirs: Mapping[str, np.ndarray], kind: str, model, architecture: str) -> Weights:
    """Maps the weights of one mixer or FFN.

    Args:
      theirs: by their names within the layer.
      kind: the registered name of the layer that is to have them.
      model: ``config.model``, resolved, as the layer reads it.
      architecture: ``model_type`` of transformers that they come from.

    Returns:
      Arrays by the names of the layer's parameters, in the types they came in.

    Raises:
      UserError: the layer does not say what that architecture calls its weights, or it has no such weight.
    """
    return _placed(theirs, published(kind, architecture).weights, f'the layer {kind!r} from {architecture}', model)


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
      model: ``config.model``, resolved, whose pattern says which layer takes them.
      architecture: ``model_type`` of transformers.

    Returns:
      Arrays by the names of the model's parameters.

    Raises:
      UserError: an architecture, a layer or a weight that has no place, or a place that has no weight, named.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f'the architecture {architecture!r} is not known; choose from {", ".join(ARCHITECTURES)}')
    known = ARCHITECTURES[architecture]
    if model.embedding_norm and not known.embedding_norm:
        raise UserError(f'{architecture} has no norm after the embedding, which model.embedding_norm asks for')
    top = known.top(model)
    layers: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    outside: dict[str, np.ndarray] = {}
    for name, value in theirs.items():
        match = re.fullmatch(rf'{known.body}\.{known.layers}\.(\d+)\.(\w+)\.(.+)', name)
        if match and name not in top:
            layers.setdefault(int(match[1]), {}).setdefault(match[2], {})[match[3]] = value
        else:
            outside[name] = value
    places = [_modules(model, text, known.norms, architecture) for text in model.pattern]
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
        for module, place in places[j].items():
            what = f'{module} of {where}'
            for name, value in _whole(found.get(module, {}), place.weights, what, place.model).items():
                stacks.setdefault(f'blocks/layers/{j}/{place.part}/{name}', []).append(value)
    stacked = {name: np.stack(values) for name, values in stacks.items()}
    return _whole(outside, top, f'a model from {architecture}', model) | stacked


def of_modules(theirs: Mapping[str, np.ndarray]) -> Weights:
    """The weights of a checkpoint's files by the names of the modules that load them, which hold all experts as one.

    Raises:
      UserError: an expert lacks one of its three matrices.
    """
    ours: Weights = {}
    experts: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    named = dict(zip(MIXTRAL.matrices, MATRICES, strict=True))
    for name, value in theirs.items():
        if name.endswith('.rotary_emb.inv_freq'):  # of older Llamas: no weights, as the configuration says them
            continue
        for module, otherwise in MIXTRAL.files.items():
            name = name.replace(f'.{otherwise}.', f'.{module}.')
        name = name.replace('backbone.embedding.', 'backbone.embeddings.')
        if match := re.fullmatch(r'(.+\.experts)\.(\d+)\.(\w+)\.weight', name):
            experts.setdefault(match[1], {})[named.get(match[3], match[3]), int(match[2])] = value
        else:
            ours[name] = value
    for name, found in experts.items():
        count = 1 + max(index for _, index in found)
        if missing := {(each, i) for each in MATRICES for i in range(count)} ^ found.keys():
            matrix, index = min(missing)
            raise UserError(
                f'{name} has {count} experts, each with {", ".join(MATRICES)}, but for {matrix} of expert {index}'
            )
        gate, up, down = (np.stack([found[each, i] for i in range(count)]) for each in MATRICES)
        ours |= {f'{name}.gate_up_proj': np.concatenate([gate, up], axis=1), f'{name}.down_proj': down}
    return ours


def published_weights(ours: Mapping[str, np.ndarray], model, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """The other way of ``model_weights``: a model's parameters by the names of transformers' modules, one by one.

    Args:
      ours: arrays by the names of the model's parameters.
      model: ``config.model``, resolved; ``configurations`` has read it in that architecture's config.json.
      architecture: ``model_type`` of transformers.

    Raises:
      UserError: a parameter has no place in that architecture, named.
    """
    known, size = ARCHITECTURES[architecture], len(model.pattern)
    outside = {name: value for name, value in ours.items() if not name.startswith('blocks/')}
    yield from _theirs(outside, known.top(model), architecture, model)
    for index in range(model.num_blocks * size):
        block, j = divmod(index, size)
        for module, place in _modules(model, model.pattern[j], known.norms, architecture).items():
            prefix = f'blocks/layers/{j}/{place.part}/'
            own = {name.removeprefix(prefix): value[block] for name, value in ours.items() if name.startswith(prefix)}
            what = f'{architecture}, whose {module} is {place.part} of {model.pattern[j]} here,'
            for name, value in _theirs(own, place.weights, what, place.model):
                yield f'{known.body}.{known.layers}.{index}.{module}.{name}', value


def of_files(theirs: Iterable[tuple[str, np.ndarray]], architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """The other way of ``of_modules``: the weights as the files of a checkpoint have them, each expert's by itself."""
    known = ARCHITECTURES[architecture]
    for name, value in theirs:
        for module, otherwise in known.files.items():
            name = name.replace(f'.{module}.', f'.{otherwise}.')
        bank, _, joint = name.partition('.experts.')
        matrices = {'': (), 'gate_up_proj': known.matrices[:2], 'down_proj': known.matrices[2:]}[joint]
        if not matrices:
            yield name, value
        for i, expert in enumerate(value if matrices else ()):
            for matrix, part in zip(matrices, np.split(expert, len(matrices)), strict=True):
                yield f'{bank}.experts.{i}.{matrix}.weight', part


class _Module(NamedTuple):
    """Where a module of a published decoder layer goes: which part of ours, what it calls its weights, its options."""

    part: str
    weights: Mapping[str, Place]
    model: Any


def _modules(model, text: str, norms: Mapping[str, str], architecture: str) -> dict[str, _Module]:
    """The modules of a published decoder layer, by what it calls them."""
    parts = pattern.parts(model, text)
    normed = ['mixer_norm']
    if 'ffn' in parts and not pattern.parse_layer(text, pattern.named_kinds(model)).parallel:  # which share one
        normed.append('ffn_norm')
    found = {}
    for role, part in parts.items():
        module, weights = published(part.kind, architecture, role)
        found[module] = _Module(role, weights, part.model)
    return {norms[ours]: _Module(ours, _norm(model.norm), model) for ours in normed} | found


def _norm(kind: str, prefix: str = '') -> dict[str, Place]:
    """The places, below a prefix, of the weights of a norm."""
    return {theirs: same(prefix + ours) for theirs, ours in NORM_WEIGHTS[kind].items()}


def _whole(theirs: Mapping[str, np.ndarray], places: Mapping[str, Place], what: str, model) -> Weights:
    """``_placed``, where every place must have its weight."""
    ours = _placed(theirs, places, what, model)
    if missing := [name for name in places if name not in theirs]:
        raise UserError(f'{what} lacks {", ".join(missing)}')
    return ours


def _theirs(
    ours: Mapping[str, np.ndarray], places: Mapping[str, Place], what: str, model
) -> Iterator[tuple[str, np.ndarray]]:
    """Theirs of ours, all of which must have a place."""
    theirs = {name: place.theirs(ours, model) for name, place in places.items()}
    if left := ours.keys() - _placed(theirs, places, what, model).keys():
        raise UserError(f'{what} has no place for the parameter {min(left)}')
    yield from theirs.items()


def _placed(theirs: Mapping[str, np.ndarray], places: Mapping[str, Place], what: str, model) -> Weights:
    ours: Weights = {}
    for name, value in theirs.items():
        if name not in places:
            raise UserError(f'{what} has no place for the weight {name}, only for {", ".join(places)}')
        ours |= places[name].ours(value, model)
    return ours
