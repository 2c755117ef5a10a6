"""``mixcon export``: a checkpoint as a folder that Hugging Face transformers loads, and all that reads its format."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, processors

from mixcon_jax import config as configs
from mixcon_jax import derived
from mixcon_jax.data import tokenizer as tokenizers
from mixcon_jax.errors import UserError
from mixcon_jax.interop import descriptions, huggingface, weight_files
from mixcon_jax.runs.weights import load_params
from mixcon_jax.runs.workdir import explained
from mixcon_jax.trees import named_leaves


def export_model(
    workdir: str | Path,
    out: str | Path,
    step: int | str | None = None,
    dtype: str = 'float32',
    say: Callable[[str], None] = print,
) -> None:
    """Writes config.json, generation_config.json, safetensors files, tokenizer.json and tokenizer_config.json.

    Args:
      workdir: a run directory.
      out: the folder to make; nothing may be there.
      step: a checkpoint's step, ``'best'`` or None for the newest intact one.
      dtype: of the weights in the files, one of ``weight_files.WRITTEN``; they are trained in float32.
      say: takes a line about what was exported.

    Raises:
      UserError: no such run or checkpoint, a model that no published architecture is, something at ``out``, or a disk
        that is full or the like.
    """
    target = derived.new_folder(out)
    trees, meta = load_params(workdir, step, say=say)
    config = configs.resolve(configs.from_dict(meta.config))
    values = descriptions.describe(config)
    if any(np.any(leaf) for leaf in jax.tree.leaves(trees['buffers'])):
        raise UserError(f"{values['model_type']} has no biases of routing, which {workdir} learned by balance='bias'")
    words = tokenizers.from_json(meta.tokenizer, f'the tokenizer of checkpoint {meta.step}')
    tokenizer_json, begins = _beginning_documents(words)
    ends = dict.fromkeys(('eos_token_id', 'pad_token_id'), words.eot_id) | {'bos_token_id': words.id_of(begins)}
    ours = {name: np.asarray(leaf) for name, leaf in named_leaves(trees['params']).items()}
    weights = huggingface.published_weights(ours, config.model, values['model_type'])
    with derived.making(target) as folder, explained(target):
        folder.mkdir()
        for name, described in {
            'config.json': values | ends | {'torch_dtype': dtype, 'dtype': dtype},
            'generation_config.json': ends,
            'tokenizer_config.json': {
                'tokenizer_class': 'PreTrainedTokenizerFast',
                **dict.fromkeys(('eos_token', 'pad_token'), words.eot),
                'bos_token': begins,
                'clean_up_tokenization_spaces': False,
                'model_max_length': config.data.seq_len,
            },
        }.items():
            (folder / name).write_text(json.dumps(described, indent=2) + '\n', encoding='utf-8')
        (folder / 'tokenizer.json').write_text(tokenizer_json, encoding='utf-8')
        weight_files.write_model(folder, huggingface.of_files(weights, values['model_type']), dtype)
    if begins != words.eot:
        say(f'its tokenizer begins texts with {begins!r}, which training and sampling here begin with {words.eot!r}')
    count = sum(leaf.size for leaf in ours.values())
    say(f'step {meta.step} of {workdir} in {target}: {values["architectures"][0]}, {count:,} parameters in {dtype}')


def _beginning_documents(words: tokenizers.Tokenizer) -> tuple[str, str]:
    """A tokenizer.json that begins texts with a token, and that token: training's, unless it has its own."""
    backend = Tokenizer.from_str(words.to_json())
    if begun := backend.encode('').tokens:
        return backend.to_str(), begun[0]
    eot, before = words.eot, backend.post_processor
    beginning = processors.TemplateProcessing(
        single=f'{eot} $A', pair=f'{eot} $A {eot} $B:1', special_tokens=[(eot, words.eot_id)]
    )
    backend.post_processor = beginning if before is None else processors.Sequence([before, beginning])
    return backend.to_str(), eot
