"""``mixcon merge``: a checkpoint whose layers are smaller and compute the same, as a run directory of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array

from mixcon_jax import config as configs
from mixcon_jax import derived
from mixcon_jax.errors import UserError
from mixcon_jax.models.context import Context
from mixcon_jax.models.pattern import named_kinds, parts, resolve
from mixcon_jax.runs.weights import load_params
from mixcon_jax.trees import Tree, named_leaves

TOKENS = 64  # on which both models are compared


def merge(
    workdir: str | Path, out: str | Path, step: int | str | None = None, say: Callable[[str], None] = print
) -> None:
    """Writes a run directory with one checkpoint, to evaluate, to sample from, or to train on by ``train.init_from``.

    Args:
      workdir: a run directory.
      out: the folder to make; nothing may be there.
      step: a checkpoint's step, ``'best'`` or None for the newest intact one.
      say: takes a line about what was merged.

    Raises:
      UserError: no such run or checkpoint, nothing in it to merge, or something is at ``out``.
    """
    folder = derived.new_folder(out)
    trees, meta = load_params(workdir, step, say=say)
    config = configs.resolve(configs.from_dict(meta.config))
    params, model, count = merged(trees['params'], config.model)
    if not count:
        raise UserError(f'no layer of {workdir} has anything to merge')
    # NumPy's maximum is NaN where there is one; XLA:CPU's is not.
    before, after = (np.asarray(x) for x in (_logits(trees, config.model), _logits(trees | {'params': params}, model)))
    difference = float(np.abs(after - before).max() / np.abs(before).max())
    fewer = sum(leaf.size for leaf in jax.tree.leaves(trees['params'])) - sum(x.size for x in jax.tree.leaves(params))
    config.model = model
    derived.write(folder, config, trees | {'params': params}, meta, workdir, say)
    say(f'step {meta.step} of {workdir} in {folder}: {count} layers merged, {fewer:,} parameters fewer')
    say(f'logits differ by {difference:.1e} of the largest, in float32, on {TOKENS} tokens')


def merged(params: Tree, model: ml_collections.ConfigDict) -> tuple[Tree, ml_collections.ConfigDict, int]:
    """The parameters and ``config.model`` after every layer's ``merge``, and how many layers of the model it changed.

    Args:
      params: nested dicts, stacked over blocks.
      model: ``config.model``.
    """
    model = resolve(model)
    flat, after, count = named_leaves(params), ml_collections.ConfigDict(model.to_dict()), 0
    for j, text in enumerate(model.pattern):
        for role, part in parts(model, text).items():
            prefix = f'blocks/layers/{j}/{role}/'
            own = {name.removeprefix(prefix): flat[name] for name in flat if name.startswith(prefix)}
            # Of one block after another: a layer's `merge` knows the shapes that it has by itself.
            blocks = [_merged(part, own, i) for i in range(model.num_blocks)]
            found = [block for block in blocks if block is not None]
            if not found:
                continue
            count += len(found)
            flat = {name: value for name, value in flat.items() if not name.startswith(prefix)}
            for name in found[0][1]:
                flat[prefix + name] = jnp.stack([weights[name] for _, weights in found])
            group = after.layers[part.name] if part.name in named_kinds(model) else None
            for option, value in found[0][0].items():
                where = group if group is not None else after[part.describe().group_of(option)]
                where[option] = value
    return unflatten_dict(flat, sep='/'), after, count


def _merged(part: Any, own: Mapping[str, Array], block: int) -> tuple[Mapping[str, Any], Mapping[str, Array]] | None:
    return part.load().merge(part.model, {name: value[block] for name, value in own.items()})


def _logits(trees: Mapping[str, Tree], model: ml_collections.ConfigDict) -> Array:
    """Of a row of random tokens, in float32."""
    model = ml_collections.ConfigDict(model.to_dict())
    model.dtype = 'float32'
    net = derived.built(model, trees)
    tokens = jax.random.randint(jax.random.key(0), (1, TOKENS), 0, model.vocab_size)
    return net.logits(net(tokens, Context.whole(1, TOKENS))[0])
