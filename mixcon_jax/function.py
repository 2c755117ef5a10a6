"""What of a configuration decides the function that a model's weights are of."""

from typing import Any

import ml_collections

from mixcon_jax import config as configs
from mixcon_jax.models import pattern
from mixcon_jax.options import OPTIONS


def options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Values of the options of the model, by key, that decide what given weights and buffers compute.

    Those of learning alone do not, nor what only rounds otherwise: forms, chunks, the compute type. Of the groups that
    layers bring there are those that the pattern's layers read.

    Args:
      config: a run's, resolved.
    """
    model = config.model
    parts = [part for text in model.pattern for part in pattern.parts(model, text).values()]
    groups = {*OPTIONS['model'], *(group for part in parts for group in part.describe().options)}
    return {
        key: configs.get(config, key)
        for key, option in configs.known(config).items()
        if key.startswith('model.') and key.split('.')[1] in groups and not option.free and not option.learning
        if key != 'model.dtype'
    }


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """``{key: (old value, new value)}`` of the deciding options that two resolved configurations have otherwise.

    One that only one of them has, as its layers are others, is not among them: the pattern is.
    """
    before, after = options(old), options(new)
    return {key: (before[key], after[key]) for key in before if key in after and before[key] != after[key]}
