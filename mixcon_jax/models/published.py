"""What published checkpoints call a layer's weights and how they lay them out: what ``Layer.PUBLISHED`` is made of.

What makes ours of theirs only renames, transposes, splits or joins, so the same function carries a gradient over.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Weights = dict[str, np.ndarray]
Place = Callable[[np.ndarray, Any], Weights]  # one published weight, and config.model -> ours, by name


class Published(NamedTuple):
    """A layer in one published architecture.

    Attributes:
      module: what a decoder layer calls it there.
      weights: ``{name below the module: what makes ours of it}``.
    """

    module: str
    weights: Mapping[str, Place]


def same(name: str) -> Place:
    """A weight that lies as ours of this name does."""
    return lambda value, model: {name: value}


def linear(name: str) -> Place:
    """The weight of a linear map, ``[out, in]`` there and ``[in, out]`` here."""
    return lambda value, model: {name: value.T}


def channels(name: str) -> Place:
    """A number for each channel, ``[1, 1, channels]`` there and ``[channels]`` here."""
    return lambda value, model: {name: value[0, 0]}


def depthwise(name: str) -> Place:
    """The filters of a depthwise convolution, ``[channels, 1, width]`` there and ``[width, channels]`` here."""
    return lambda value, model: {name: value[:, 0].T}


def experts(*names: str) -> Place:
    """The linear maps of all experts, ``[experts, out, in]`` there and ``[experts, in, out]`` here.

    Of several names the maps lie behind one another along ``out``, equally wide.
    """

    def place(value: np.ndarray, model: Any) -> Weights:
        parts = np.split(value, len(names), axis=1)
        return {name: part.swapaxes(1, 2) for name, part in zip(names, parts, strict=True)}

    return place


def joined(widths: Callable[[Any], Mapping[str, int]], place: Callable[[str], Place]) -> Place:
    """What several of ours are parts of, behind one another along its first axis.

    Args:
      widths: of ``config.model``, how wide each is, by its name, in their order.
      place: of a name, where its part goes.
    """

    def split(value: np.ndarray, model: Any) -> Weights:
        sizes = widths(model)
        parts = np.split(value, np.cumsum(list(sizes.values()))[:-1])
        return {
            ours: w for name, part in zip(sizes, parts, strict=True) for ours, w in place(name)(part, model).items()
        }

    return split
