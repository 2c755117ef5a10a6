"""Sizes of a model by counting, without allocating it: parameters, operations per token, bytes of decode state."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
from flax import nnx

from mixcon_jax.models.decoder import abstract
from mixcon_jax.models.layers import Parameters
from mixcon_jax.models.pattern import Part, parts, resolve

FAR = 4097  # a width that tells how parameters grow, whatever steps they take


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
      total: all of them.
      active: those that one token uses: of E experts, top_k.
      embedding: the embedding's and the output head's share of the total.
      added: what layers add to those that they extend, Conba to the Mamba mixer with norms; contained in total and
        active.
    """

    total: int
    active: int
    embedding: int
    added: int


def parameter_count(model) -> Counts:
    """Counts the parameters of ``config.model``."""
    layers = _layers(model)
    total = active = embedding = 0
    for path, shape, _ in parameters(model):
        size = math.prod(shape)
        total += size
        active += round(size * _used_share(layers, path))
        embedding += size if path in ('embedding', 'output') else 0
    added = sum(_additions(part) for layer in layers for part in layer.values())
    return Counts(total, active, embedding, model.num_blocks * added)


def width_for(model, total: int, key: str = 'mlp.hidden_dim') -> int:
    """The width at which ``config.model`` comes nearest to ``total`` parameters: arms of an ablation made equal.

    Args:
      model: ``config.model``; it is not changed.
      total: parameters to have.
      key: the option to choose: a width of the FFNs, with which the number of parameters grows.

    Raises:
      ValueError: without any of that width there are too many already, or none of the parameters depend on it.
    """
    trial = model.copy_and_resolve_references()
    *groups, name = key.split('.')
    options = functools.reduce(lambda group, part: group[part], groups, trial)

    @functools.cache
    def counted(width: int) -> int:
        options[name] = width
        return sum(math.prod(shape) for _, shape, _ in parameters(trial))

    least, slope = counted(1), (counted(FAR) - counted(1)) / (FAR - 1)
    if slope <= 0:
        raise ValueError(f'model.{key} changes no number of parameters; choose a width that the pattern uses')
    if total < least - slope / 2:
        raise ValueError(f'the model has {least:,} parameters at model.{key}=1, more than the {total:,} wanted')
    # Between a width with too few parameters and one with enough, closer and closer, along the line through both.
    low, high = 0, 1 + math.ceil(max(0, total - least) / slope)
    while counted(high) < total:
        low, high = high, 2 * high
    while high - low > 1:
        few = counted(low) if low else least - slope
        middle = low + round((total - few) / (counted(high) - few) * (high - low))
        middle = min(max(middle, low + 1), high - 1)
        low, high = (middle, high) if counted(middle) < total else (low, middle)
    while low > 1 and counted(low - 1) == counted(low):  # a width that is derived may change at every few of this one
        low -= 1
    return min((width for width in (low, high) if width), key=lambda width: abs(counted(width) - total))


def parameters(model) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Yields ``(path, shape, logical axes)`` of every parameter of ``config.model``, stacked blocks as one."""
    for path, variable in nnx.to_flat_state(nnx.state(abstract(model), nnx.Param)):
        yield '/'.join(map(str, path)), variable.shape, variable.get_metadata()['logical_axes']


def flops_per_token(model, seq_len: int) -> float:
    """Operations of one training token, forward and backward (three times the forward's).

    Counts two per multiply-add of every matrix that the token meets (top_k experts, the head, not the embedding's
    look-up), and what each layer's class says (``Layer.flops``): causal
    attention over ``seq_len / 2`` keys, the scan's state updates and the matrix gain's products.
    Elementwise work (gates, taps, norms, a diagonal gain) is left out: what has two axes is a matrix, `terms` not
    counted, unless one of them is `conv`, `state` or `filter`.
    Recomputation (``remat``) is not counted, as usual for MFU.
    """
    layers, forward = _layers(model), 0.0
    for path, shape, axes in parameters(model):
        if path == 'embedding' and not model.tie_embeddings:
            continue
        matrix = [axis for axis in axes if axis not in ('layers', 'terms')]
        if len(matrix) >= 2 and not {'conv', 'state', 'filter'} & set(axes):
            forward += 2 * math.prod(shape) * _used_share(layers, path)
    for part in (part for layer in layers for part in layer.values()):
        forward += model.num_blocks * part.load().flops(part.model, seq_len)
    return 3 * forward


def exponentials_per_token(model, seq_len: int) -> tuple[float, float]:
    """Exponentials of a token, forward and backward: what layers say (``Layer.exponentials``), and the loss's."""
    forward = backward = float(model.vocab_size)
    for part in (part for layer in _layers(model) for part in layer.values()):
        own = part.load().exponentials(part.model, seq_len)
        forward, backward = forward + model.num_blocks * own[0], backward + model.num_blocks * own[1]
    return forward, backward


def state_bytes(model, max_len: int, rows: int = 1) -> int:
    """Bytes of decode state of so many sequences, one if left out, whose attention caches hold ``max_len`` tokens."""
    graphdef, variables = nnx.split(abstract(model))
    state = jax.eval_shape(lambda variables: nnx.merge(graphdef, variables).init_state(rows, max_len), variables)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _layers(model) -> list[dict[str, Part]]:
    """The parts of each layer of the pattern, by role, with what they read."""
    model = resolve(model)
    return [parts(model, text) for text in model.pattern]


def _used_share(layers: list[dict[str, Part]], path: str) -> float:
    """The share of a parameter that one token uses, as the layer says that has it: ``blocks/layers/j/role/name``."""
    blocks, *rest = path.split('/', 4)
    if blocks != 'blocks' or rest[2] not in ('mixer', 'ffn'):
        return 1.0
    part = layers[int(rest[1])][rest[2]]
    return part.load().active_share(part.model, rest[3])


def _additions(part: Part) -> int:
    """Parameters of one layer that its class adds to the one that it extends."""
    plain = part.load().without_additions(part.model)
    return 0 if plain is None else _size(part, part.model) - _size(part, plain)


def _size(part: Part, model) -> int:
    """Parameters of one part, with these options."""
    layer = nnx.eval_shape(lambda: part.load()(model, Parameters(None), 1))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
