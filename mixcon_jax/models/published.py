"""What published checkpoints call a layer's weights and how they lay them out: what ``Layer.PUBLISHED`` is made of.

What makes ours of theirs, and theirs of ours, only renames, transposes, splits or joins, so the same functions carry a
gradient over.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Weights = dict[str, np.ndarray]


class Place(NamedTuple):
    """Where a published weight lies here: in one of ours, or in several.

    Attributes:
      ours: of the published weight and ``config.model``, ours by name.
      theirs: of ours by name, these and perhaps more, and ``config.model``, the published weight.
    """

    ours: Callable[[np.ndarray, Any], Weights]
    theirs: Callable[[Mapping[str, np.ndarray], Any], np.ndarray]


class Published(NamedTuple):
    """A layer in one published architecture.

    Attributes:
      module: what a decoder layer calls it there.
      weights: ``{name below the module: its place here}``.
    """

    module: str
    weights: Mapping[str, Place]


def same(name: str) -> Place:
    """A weight that lies as ours of this name does."""
    return _one(name, lambda value: value, lambda value: value)


def linear(name: str) -> Place:
    """The weight of a linear map, ``[out, in]`` there and ``[in, out]`` here."""
    return _one(name, lambda value: value.T, lambda value: value.T)


def channels(name: str) -> Place:
    """A number for each channel, ``[1, 1, channels]`` there and ``[channels]`` here."""
    return _one(name, lambda value: value[0, 0], lambda value: value[None, None])


def depthwise(name: str) -> Place:
    """The filters of a depthwise convolution, ``[channels, 1, width]`` there and ``[width, channels]`` here."""
    return _one(name, lambda value: value[:, 0].T, lambda value: value.T[:, None])


def _one(name: str, ours: Callable, theirs: Callable) -> Place:
    return Place(lambda value, model: {name: ours(value)}, lambda weights, model: theirs(weights[name]))


def experts(*names: str) -> Place:
    """The linear maps of all experts, ``[experts, out, in]`` there and ``[experts, in, out]`` here.

    Of several names the maps lie behind one another along ``out``, equally wide.
    """

    def ours(value: np.ndarray, model: Any) -> Weights:
        parts = np.split(value, len(names), axis=1)
        return {name: part.swapaxes(1, 2) for name, part in zip(names, parts, strict=True)}

    def theirs(weights: Mapping[str, np.ndarray], model: Any) -> np.ndarray:
        return np.concatenate([weights[name].swapaxes(1, 2) for name in names], axis=1)

    return Place(ours, theirs)


def joined(widths: Callable[[Any], Mapping[str, int]], place: Callable[[str], Place]) -> Place:
    """What several of ours are parts of, behind one another along its first axis.

    Args:
      widths: of ``config.model``, how wide each is, by its name, in their order.
      place: of a name, where its part goes.
    """

    def ours(value: np.ndarray, model: Any) -> Weights:
        sizes = widths(model)
        parts = np.split(value, np.cumsum(list(sizes.values()))[:-1])
        return {
            name: w
            for each, part in zip(sizes, parts, strict=True)
            for name, w in place(each).ours(part, model).items()
        }

    def theirs(weights: Mapping[str, np.ndarray], model: Any) -> np.ndarray:
        return np.concatenate([place(name).theirs(weights, model) for name in widths(model)])

    return Place(ours, theirs)
