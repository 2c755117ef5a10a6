"""What of a configuration decides the function that a model's weights are of."""

from typing import Any

import ml_collections

from mixcon_jax import config as configs
from mixcon_jax.models import pattern
from mixcon_jax.options import OPTIONS, Option, leaves


def deciding(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Values of the options of the model, by key, that decide what given weights and buffers compute.

    Those of learning alone do not, nor what only rounds otherwise: forms, chunks, the compute type. Of the groups that
    layers bring there are those that the pattern's layers read, each as its layer reads it.

    Args:
      config: a run's, resolved.
    """
    model = config.model
    found = {
        f'model.{key}': configs.get(config, f'model.{key}')
        for key, option in leaves(OPTIONS['model'])
        if not option.free and not option.learning and key != 'dtype'
    }
    named = pattern.named_kinds(model)
    for part in (part for text in model.pattern for part in pattern.parts(model, text).values()):
        for group, options in part.describe().options.items():
            prefix = f'model.layers.{part.name}' if part.name in named else f'model.{group}'
            own = part.model[group]
            found |= {f'{prefix}.{name}': own[name] for name, option in options.items() if _decides(option, own)}
    return found


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """``{key: (old value, new value)}`` of the deciding options that two resolved configurations have otherwise.

    One that only one of them has, as its layers are others, is not among them: the pattern is.
    """
    before, after = deciding(old), deciding(new)
    return {key: (before[key], after[key]) for key in before if key in after and before[key] != after[key]}


def _decides(option: Option, group: Any) -> bool:
    return not option.free and not option.learning and (not option.needs or bool(group[option.needs]))
