"""Exports models made here, with their logits, for `load_exports.py`: `python -m tests.parity.exports DIR`."""

import pathlib
import sys

import jax
import numpy as np
import tokenizers
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax import derived
from mixcon_jax.interop.exporting import export_model
from mixcon_jax.models import decoder
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Buffer
from mixcon_jax.runs.checkpoints import Meta
from mixcon_jax.trees import from_state

ROTARY = {'attention.rope': True}
RWKV = {'norm': 'layer', 'norm_eps': 1e-5, 'embedding_norm': True}
MAMBA2 = {'mamba2.d_state': 8, 'mamba2.head_dim': 16, 'mamba2.groups': 2}
WIDTHS = {'dim': 32, 'attention.num_kv_heads': 2, 'mlp.hidden_dim': 48, 'moe.hidden_dim': 48, 'ssm.d_state': 8}
# By name: the pattern, how often it repeats, options below config.model, and the type of the weights in the files.
MODELS = {
    'llama': (('attention+mlp',), 3, ROTARY | {'attention.rope_theta': 5e5, 'attention.head_dim': 16}, 'float32'),
    'llama_bfloat16': (('attention+mlp', 'attention+mlp'), 1, ROTARY | {'tie_embeddings': True}, 'bfloat16'),
    'mixtral': (('attention+moe',), 2, ROTARY | {'moe.renormalize': True, 'moe.num_experts': 6}, 'float32'),
    'mamba': (('mamba',), 3, {'tie_embeddings': True}, 'float32'),
    'falcon_mamba': (('mamba',), 2, {'mamba.norms': True, 'mamba.norm_scales': False}, 'float32'),
    'mamba2': (('mamba2',), 2, MAMBA2, 'float32'),
    'jamba': (('mamba+mlp', 'mamba+moe', 'attention+mlp', 'mamba+moe'), 2, {'mamba.norms': True}, 'float32'),
    'jamba_of_experts_alone': (('mamba+moe',), 2, {'mamba.norms': True, 'tie_embeddings': True}, 'float32'),
    'bamba': (('mamba2+mlp', 'attention+mlp'), 2, MAMBA2 | ROTARY | {'attention.rope_dim': 4}, 'float32'),
    'rwkv': (('rwkv4+rwkv_channel_mix',), 8, RWKV, 'float32'),
}  # fmt: skip
TOKENS = (2, 37)


def config_of(pattern: tuple[str, ...], blocks: int, options: dict):
    """The resolved configuration of a small run."""
    config = configs.default()
    config.data.seq_len = 64
    config.model.update(pattern=pattern, num_blocks=blocks, init_std=0.2)  # so that no layer adds next to nothing
    for key, value in ({'vocab_size': 61} | WIDTHS | options).items():
        configs.put(config, f'model.{key}', value)
    return configs.resolve(configs.validate(config))


def run(folder: pathlib.Path, config) -> decoder.Decoder:
    """Writes a run of a model as it begins, with a tokenizer of as many words; returns the model."""
    model = decoder.create(config.model, 0)
    trees = {'params': from_state(nnx.state(model, nnx.Param)), 'buffers': from_state(nnx.state(model, Buffer))}
    words = {'<|endoftext|>': 0} | {f'w{i}': i for i in range(1, 61)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, 'w1'))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(['<|endoftext|>'])
    derived.write(folder, config, trees, Meta(0, config.to_dict(), backend.to_str()), folder)
    return model


def main(out: pathlib.Path) -> None:
    for i, (name, (pattern, blocks, options, dtype)) in enumerate(MODELS.items()):
        model = run(out / 'runs' / name, config_of(pattern, blocks, options))
        export_model(out / 'runs' / name, out / name, dtype=dtype)
        tokens = np.random.default_rng(i).integers(0, 61, TOKENS, np.int32)
        logits = jax.jit(lambda tokens, model=model: model.logits(model(tokens, Context.whole(*TOKENS))[0]))(tokens)
        np.savez(out / f'{name}.npz', tokens=tokens, y=np.asarray(logits))


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
