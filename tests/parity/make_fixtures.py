"""Computes the reference outputs and gradients of published implementations (Hugging Face transformers, on the CPU).

Runs in an environment of its own, made by `make parity`, and writes one .npz a case into the folder that it is given:

  class         name of the module's class
  x | tokens    the input, [B, T, D] float32 or [B, T] int32
  y             the output
  dy            the random cotangent that the gradients are taken for
  dx            the input's gradient (layers only)
  w/NAME        each weight under its name in transformers, float32
  dw/NAME       its gradient
  dx@T, dw@T/NAME
                the gradients of the first T tokens alone, for some T (long layers only; the weights' for one of them)

Of a whole model the folder NAME is what `save_pretrained` writes, of which the committed fixtures have config.json.

Weights are float32 numbers; the modules compute in float64 wherever their own code lets them, which makes the stored
values exact to float32 rounding. Seeds are fixed, so a second run writes the same numbers, to their rounding.
"""

import math
import os
import pathlib
import sys
import zlib

os.environ['HF_HUB_OFFLINE'] = '1'  # all is made here

import numpy as np
import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.models.bamba.modeling_bamba import BambaAttention, BambaMixer, BambaRotaryEmbedding
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba.modeling_jamba import (
    JambaAttention,
    JambaMambaMixer,
    JambaMLP,
    JambaRMSNorm,
    JambaSparseMoeBlock,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward, RwkvSelfAttention

B, T, D = 2, 37, 32
LONG = (1, 129)  # rows and tokens of recurrences, whose tests read prefixes of them
PREFIXES, OF_WEIGHTS = (1, 3, 17, 64), 17  # tokens whose gradients there are, too, and those of them with the weights'
COMMON = {
    'hidden_size': D,
    'intermediate_size': 48,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'vocab_size': 61,
    'attn_implementation': 'eager',
    'experts_implementation': 'eager',
}
JAMBA = {
    'num_hidden_layers': 4,
    'attn_layer_period': 4,
    'attn_layer_offset': 2,
    'num_experts': 4,
    'mamba_d_state': 8,
    'mamba_dt_rank': 4,
}


def jamba_config() -> JambaConfig:
    return JambaConfig(**COMMON, **JAMBA)


def llama_config() -> LlamaConfig:
    return LlamaConfig(**COMMON, num_hidden_layers=2, rms_norm_eps=1e-5)


def mixtral_config() -> MixtralConfig:
    return MixtralConfig(**COMMON, num_hidden_layers=2, num_local_experts=4)


def mamba_config() -> MambaConfig:
    return MambaConfig(
        hidden_size=D, state_size=8, time_step_rank=4, num_hidden_layers=2, vocab_size=COMMON['vocab_size']
    )


def mamba2_config(groups: int) -> Mamba2Config:
    return Mamba2Config(
        hidden_size=D, num_heads=4, head_dim=16, state_size=8, n_groups=groups, chunk_size=16, num_hidden_layers=2,
        layer_norm_epsilon=1e-6, vocab_size=COMMON['vocab_size'],
    )  # fmt: skip


def falcon_mamba_config() -> FalconMambaConfig:
    return FalconMambaConfig(
        hidden_size=D, state_size=8, time_step_rank=4, num_hidden_layers=2, vocab_size=COMMON['vocab_size'],
        mixer_rms_eps=1e-3, tie_word_embeddings=False,
    )  # fmt: skip


def bamba_config() -> BambaConfig:
    return BambaConfig(
        **COMMON, num_hidden_layers=2, attn_layer_indices=[1], rms_norm_eps=1e-6,
        pad_token_id=None,  # else no gradient reaches its row of the embedding
        mamba_n_heads=4, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16,
    )  # fmt: skip


def rwkv_config() -> RwkvConfig:
    return RwkvConfig(hidden_size=D, intermediate_size=48, num_hidden_layers=2, vocab_size=COMMON['vocab_size'])


def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Gives every weight a random float32 value of a size that keeps activations near one."""
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        leaf = name.rsplit('.', 1)[-1]
        if leaf == 'A_log' and weight.ndim == 1:
            value = noise
        elif leaf == 'A_log':
            value = torch.log(torch.arange(1.0, weight.shape[1] + 1)) + 0.1 * noise
        elif leaf in ('time_decay', 'time_first'):
            value = noise
        elif name.endswith(('dt_proj.bias', 'dt_bias')):  # inverse softplus of steps from 0.001 to 0.1
            low, high = math.log(1e-3), math.log(1e-1)
            steps = torch.exp(low + (high - low) * torch.rand(weight.shape, generator=generator))
            value = steps + torch.log(-torch.expm1(-steps))
        elif weight.ndim == 1:
            value = (0.0 if leaf == 'bias' else 1.0) + 0.1 * noise
        elif 'embed' in name:
            value = noise
        else:
            value = noise / math.sqrt(weight[0].numel() if 'conv1d' in name else weight.shape[-1])
        with torch.no_grad():
            weight.copy_(value.float())


def causal_mask(length: int) -> torch.Tensor:
    return torch.full((length, length), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]


def attend(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, attention_mask=causal_mask(x.shape[1]))[0]


def attend_rotated(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(x.shape[1])[None].expand(x.shape[:2])
    rotary = (BambaRotaryEmbedding if isinstance(module, BambaAttention) else LlamaRotaryEmbedding)(module.config)
    return module(x, position_embeddings=rotary(x, positions), attention_mask=causal_mask(x.shape[1]))[0]


def call(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def first(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)[0]


LAYERS = {
    'jamba_mamba_mixer': (lambda: JambaMambaMixer(jamba_config(), 0), call),
    'mamba_mixer': (lambda: MambaMixer(mamba_config(), 0), call),
    'jamba_attention': (lambda: JambaAttention(jamba_config(), 2), attend),
    'llama_attention': (lambda: LlamaAttention(llama_config(), 0), attend_rotated),
    'jamba_moe': (lambda: JambaSparseMoeBlock(jamba_config()), call),
    'mixtral_moe': (lambda: MixtralSparseMoeBlock(mixtral_config()), call),
    'jamba_mlp': (lambda: JambaMLP(jamba_config()), call),
    'jamba_rms_norm': (lambda: JambaRMSNorm(D), call),
    'mamba2_mixer': (lambda: Mamba2Mixer(mamba2_config(1), 0), call),
    'mamba2_groups_mixer': (lambda: Mamba2Mixer(mamba2_config(2), 0), call),
    'falcon_mamba_mixer': (lambda: FalconMambaMixer(falcon_mamba_config(), 0, initialize_mixer_weights=False), call),
    'bamba_mixer': (lambda: BambaMixer(bamba_config(), 0), call),
    'bamba_attention': (lambda: BambaAttention(bamba_config(), 1), attend_rotated),
    'rwkv_attention': (lambda: RwkvSelfAttention(rwkv_config(), 0), first),
    'rwkv_feed_forward': (lambda: RwkvFeedForward(rwkv_config(), 0), first),
}
MODELS = {
    'jamba_model': lambda: JambaForCausalLM(jamba_config()),
    'llama_model': lambda: LlamaForCausalLM(llama_config()),
    'mixtral_model': lambda: MixtralForCausalLM(mixtral_config()),
    'mamba_model': lambda: MambaForCausalLM(mamba_config()),
    'mamba2_model': lambda: Mamba2ForCausalLM(mamba2_config(2)),
    'falcon_mamba_model': lambda: FalconMambaForCausalLM(falcon_mamba_config()),
    'bamba_model': lambda: BambaForCausalLM(bamba_config()),
    'rwkv_model': lambda: RwkvForCausalLM(rwkv_config()),
}


def gradients(module: torch.nn.Module, y: torch.Tensor, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Backpropagates a random cotangent; returns it, the output, the weights and their gradients."""
    dy = torch.randn(y.shape, generator=generator)
    y.backward(dy.to(y.dtype))
    arrays = {'y': y.detach(), 'dy': dy}
    for name, weight in module.named_parameters():
        arrays[f'w/{name}'] = weight.detach()
        arrays[f'dw/{name}'] = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return {name: np.asarray(value.numpy(), np.float32) for name, value in arrays.items()}


def case(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Computes one case; its seed is its name. A whole model is also saved, in the folder."""
    seed = zlib.crc32(name.encode())
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = LONG if name.startswith(('mamba2', 'falcon_mamba', 'bamba', 'rwkv')) else (B, T)
    if name in MODELS:
        module = MODELS[name]()
        randomize(module, generator)
        module.save_pretrained(folder / name)
        module = module.double().eval()
        tokens = torch.randint(0, COMMON['vocab_size'], shape, generator=generator)
        y = module(input_ids=tokens, use_cache=False).logits
        return {'tokens': tokens.numpy().astype(np.int32), **gradients(module, y, generator), **description(module)}
    make, run = LAYERS[name]
    module = make()
    randomize(module, generator)
    module = module.double().eval()
    x = torch.randn(*shape, D, generator=generator)
    wide = x.double().requires_grad_()
    arrays = gradients(module, run(module, wide), generator)
    arrays |= {'x': x.numpy(), 'dx': wide.grad.numpy().astype(np.float32), **description(module)}
    for length in PREFIXES if shape == LONG else ():
        module.zero_grad()
        few = x[:, :length].double().requires_grad_()
        run(module, few).backward(torch.from_numpy(arrays['dy'][:, :length]).double())
        arrays[f'dx@{length}'] = few.grad.numpy().astype(np.float32)
        for name, weight in module.named_parameters() if length == OF_WEIGHTS else ():
            arrays[f'dw@{length}/{name}'] = weight.grad.numpy().astype(np.float32)
    return arrays


def description(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {'class': np.asarray(type(module).__name__)}


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*LAYERS, *MODELS):
        arrays = case(name, folder)
        np.savez_compressed(folder / f'{name}.npz', **arrays)
        size = (folder / f'{name}.npz').stat().st_size
        print(f'{name:20} |y| {np.abs(arrays["y"]).max():8.3f}  {size / 1024:6.0f} KiB')


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
