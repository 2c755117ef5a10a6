"""``mixcon import``: a published model in a local folder becomes a run directory of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from mixcon_jax import derived, parsing
from mixcon_jax.data import tokenizer as tokenizers
from mixcon_jax.errors import UserError
from mixcon_jax.interop import configurations, huggingface, weight_files
from mixcon_jax.models import decoder
from mixcon_jax.models.layers import Buffer
from mixcon_jax.models.published import Weights
from mixcon_jax.runs.checkpoints import Meta
from mixcon_jax.runs.mark import path_of
from mixcon_jax.runs.workdir import Workdir
from mixcon_jax.trees import from_state


def import_model(
    source: str | Path, out: str | Path, tokenizer: str | Path = '', say: Callable[[str], None] = print
) -> None:
    """Writes a run directory with one checkpoint, to evaluate, to sample from, or to train on by ``train.init_from``.

    Args:
      source: a folder with config.json and safetensors files, as transformers' ``save_pretrained`` writes it.
      out: the folder to make; nothing may be there.
      tokenizer: a tokenizer.json, or a folder with one; none takes the source's.
      say: takes a line about what was imported.

    Raises:
      UserError: something is not there, cannot be read, or has no counterpart here; or something is at ``out``.
    """
    folder, target = path_of(source, '--from'), derived.new_folder(out)
    config, weights = read(folder)
    model, words = config.model, tokenizers.load(tokenizer or folder)
    if words.vocab_size > model.vocab_size:
        raise UserError(
            f'the tokenizer has {words.vocab_size} tokens, but the model of {folder} an embedding of'
            f' {model.vocab_size} rows: name its own with --tokenizer'
        )
    if (ends := _ends(folder)) and words.eot_id not in ends:
        say(
            f'{folder} ends texts with token {", ".join(map(str, ends))}; here {words.eot!r}, {words.eot_id}, begins'
            ' and ends documents, so that what it generates may go on after its end'
        )
    config.data.tokenizer = str(Workdir(target).tokenizer_file)
    count = sum(weight.size for weight in weights.values())
    params = unflatten_dict({name: jnp.asarray(weights.pop(name)) for name in list(weights)}, sep='/')  # not held twice
    trees = {'params': params, 'buffers': _buffers(model)}
    derived.write(target, config, trees, Meta(0, config.to_dict(), words.to_json()), folder, say)
    say(f'{folder} in {target}: {count:,} parameters of {model.num_blocks} x {" ".join(model.pattern)}')


def read(folder: Path) -> tuple[ml_collections.ConfigDict, Weights]:
    """The configuration, resolved, and the parameters by name, in float32, of a published model; errors as above."""
    values = parsing.json_file(folder / 'config.json')
    if values is None:
        raise UserError(f'{folder} has no config.json that can be read; give the folder of a published model')
    config = configurations.read(values)
    theirs = huggingface.of_modules(weight_files.read_model(folder))
    head = huggingface.ARCHITECTURES[values['model_type']].head
    config.model.tie_embeddings = head not in theirs and values.get('tie_word_embeddings') is not False
    weights = huggingface.model_weights(theirs, config.model, values['model_type'])
    wanted = {name: leaf.shape for name, leaf in _shapes(config.model).items()}
    found = {name: weight.shape for name, weight in weights.items()}
    if found != wanted:
        name = next(name for name in sorted(found | wanted) if found.get(name) != wanted.get(name))
        raise UserError(
            f'{folder} has {name} of shape {found.get(name, "none")}, where its config.json says'
            f' {wanted.get(name, "none")}'
        )
    return config, {name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}


def _ends(folder: Path) -> list[int]:
    """The tokens that end what the published model generates, by its files; none where they do not say."""
    for name in ('generation_config.json', 'config.json'):
        said = (parsing.json_file(folder / name) or {}).get('eos_token_id')
        if ends := [token for token in (said if isinstance(said, list) else [said]) if isinstance(token, int)]:
            return ends
    return []


def _shapes(model: ml_collections.ConfigDict) -> dict[str, Any]:
    params = nnx.state(decoder.abstract(model), nnx.Param)
    return {'/'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}


def _buffers(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """What no gradient trains, such as biases of routing, as it begins."""
    return jax.jit(lambda: from_state(nnx.state(decoder.create(model), Buffer)))()
