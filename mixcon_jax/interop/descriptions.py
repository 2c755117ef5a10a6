"""A model made here as the config.json of a published one: ``configurations``, which reads it, the other way round.

What a writer says is read back and compared with the run's options, so that no option is left out unnoticed: one that
the architecture lacks is refused by name, also one that is added here later.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_collections

from mixcon_jax import function
from mixcon_jax.errors import UserError
from mixcon_jax.interop import configurations
from mixcon_jax.interop.configurations import Options

# Not compared: the layers are, one by one, and the weights say the last.
ASIDE = ('model.pattern', 'model.num_blocks', 'model.tie_embeddings')


class Writer(NamedTuple):
    """How config.json says a model of one architecture.

    Attributes:
      loaded_by: the class of transformers.
      layers: those that a pattern may have.
      values: of ``config.model``, resolved, and its layers, the values that are the architecture's own.
      lacks: what the class cannot be made of though config.json can say it, in words; empty for nothing.
    """

    loaded_by: str
    layers: tuple[str, ...]
    values: Callable[[Any, list[str]], Options]
    lacks: Callable[[Any, list[str]], str] = lambda model, layers: ''


def describe(config: ml_collections.ConfigDict) -> Options:
    """The config.json, without tokens' numbers and the type, of the published architecture that is a run's model.

    Args:
      config: the run's, resolved.

    Raises:
      UserError: no architecture has the layers, or those that do lack an option; it is named.
    """
    model = config.model
    layers = list(model.pattern) * model.num_blocks
    lacking = {}
    for architecture, writer in WRITERS.items():
        if set(layers) <= set(writer.layers):
            values = _common(config, architecture, writer.loaded_by) | writer.values(model, layers)
            lacks = writer.lacks(model, layers)
            if not (differences := [lacks] if lacks else list(_differences(config, values))):
                return values
            lacking[architecture] = differences
    if not lacking:
        known = '; '.join(f'{architecture}: {" ".join(writer.layers)}' for architecture, writer in WRITERS.items())
        raise UserError(f'no published architecture has the layers {" ".join(model.pattern)}; there are {known}')
    nearest = min(lacking, key=lambda architecture: len(lacking[architecture]))
    raise UserError(
        f'no published architecture computes what this model does; the nearest, {nearest},'
        f' has {", ".join(lacking[nearest])}'
    )


def _common(config: ml_collections.ConfigDict, architecture: str, loaded_by: str) -> Options:
    return {
        'model_type': architecture,
        'architectures': [loaded_by],
        'vocab_size': config.model.vocab_size,
        'hidden_size': config.model.dim,
        'num_hidden_layers': len(config.model.pattern) * config.model.num_blocks,
        'hidden_act': 'silu',
        'max_position_embeddings': config.data.seq_len,
        'tie_word_embeddings': config.model.tie_embeddings,
    }


def _differences(config: ml_collections.ConfigDict, values: Options) -> Iterator[str]:
    """What the values mean that is not the run's, in words."""
    read, model = configurations.read(values), config.model
    found, wanted = (list(each.pattern) * each.num_blocks for each in (read.model, model))
    for i, (theirs, ours) in enumerate(zip(found, wanted, strict=True)):
        if theirs != ours:
            yield f'{theirs} for layer {i}, not {ours}'
            break
    for key, (theirs, ours) in function.differences(read, config).items():
        if key not in ASIDE:
            yield f'{key}={theirs!r}, not {ours!r}'


def _attention(model) -> Options:
    options = model.attention
    return {
        'num_attention_heads': options.num_heads,
        'num_key_value_heads': options.num_kv_heads,
        'head_dim': options.head_dim,
        'attention_bias': False,
    }


def _rotary(model, share: float | None = None) -> Options:
    """Rotary positions as older files say them and, in ``rope_parameters``, as newer ones do."""
    said = {'rope_theta': model.attention.rope_theta}
    if share is not None:
        said['partial_rotary_factor'] = share
    return said | {'rope_parameters': {'rope_type': 'default'} | said}


def _llama(model, layers: list[str]) -> Options:
    own = {'rms_norm_eps': model.norm_eps, 'intermediate_size': model.mlp.hidden_dim, 'mlp_bias': False}
    return own | _attention(model) | _rotary(model)


def _moe(model, experts: str) -> Options:
    return {experts: model.moe.num_experts, 'num_experts_per_tok': model.moe.top_k}


def _mixtral(model, layers: list[str]) -> Options:
    own = {'rms_norm_eps': model.norm_eps, 'intermediate_size': model.moe.hidden_dim, 'sliding_window': None}
    return own | _attention(model) | _rotary(model) | _moe(model, 'num_local_experts')


def _period(kind: str, layers: list[str]) -> tuple[int, int]:
    """Every how many layers there is one of this kind, and the first; of none, numbers that no layer has."""
    places = [i for i, text in enumerate(layers) if kind in text.split('+')]
    if not places:
        return len(layers) + 1, len(layers)
    return (places[1] - places[0] if len(places) > 1 else len(layers)), places[0]


def _jamba(model, layers: list[str]) -> Options:
    attention, expert = _period('attention', layers), _period('moe', layers)
    own = {
        'rms_norm_eps': model.norm_eps,
        'attn_layer_period': attention[0],
        'attn_layer_offset': attention[1],
        'expert_layer_period': expert[0],
        'expert_layer_offset': expert[1],
        'intermediate_size': (model.mlp if any('+mlp' in text for text in layers) else model.moe).hidden_dim,
        'mamba_d_state': model.ssm.d_state,
        'mamba_d_conv': model.ssm.d_conv,
        'mamba_expand': model.ssm.expand,
        'mamba_dt_rank': model.ssm.dt_rank,
        'mamba_conv_bias': True,
        'mamba_proj_bias': False,
    }
    none = {'num_experts': 1, 'num_experts_per_tok': 1}
    return own | _attention(model) | (_moe(model, 'num_experts') if '+moe' in ''.join(layers) else none)


def _mamba(model, layers: list[str]) -> Options:
    return {
        'layer_norm_epsilon': model.norm_eps,
        'state_size': model.ssm.d_state,
        'conv_kernel': model.ssm.d_conv,
        'expand': model.ssm.expand,
        'intermediate_size': model.ssm.expand * model.dim,
        'time_step_rank': model.ssm.dt_rank,
        'use_bias': False,
        'use_conv_bias': True,
        'residual_in_fp32': False,
    }


def _falcon_mamba(model, layers: list[str]) -> Options:
    return _mamba(model, layers) | {'mixer_rms_eps': model.mamba.norm_eps}


def _mamba2(model, layers: list[str]) -> Options:
    options = model.mamba2
    return {
        'layer_norm_epsilon': model.norm_eps,
        'state_size': options.d_state,
        'conv_kernel': options.d_conv,
        'expand': options.expand,
        'num_heads': options.expand * model.dim // options.head_dim,
        'head_dim': options.head_dim,
        'n_groups': options.groups,
        'chunk_size': options.chunk,
        'use_bias': False,
        'use_conv_bias': True,
        'residual_in_fp32': False,
    }


def _bamba(model, layers: list[str]) -> Options:
    options, attention = model.mamba2, model.attention
    width = attention.rope_dim or attention.head_dim
    share = width / attention.head_dim
    if int(share * attention.head_dim) < width:  # as it is read
        share = (width + 0.5) / attention.head_dim
    return {
        'rms_norm_eps': model.norm_eps,
        'attn_layer_indices': [i for i, text in enumerate(layers) if text.startswith('attention')],
        'intermediate_size': model.mlp.hidden_dim,
        'mlp_bias': False,
        'mamba_d_state': options.d_state,
        'mamba_d_conv': options.d_conv,
        'mamba_expand': options.expand,
        'mamba_d_head': options.head_dim,
        'mamba_n_heads': options.expand * model.dim // options.head_dim,
        'mamba_n_groups': options.groups,
        'mamba_chunk_size': options.chunk,
        'mamba_conv_bias': True,
        'mamba_proj_bias': False,
    } | _attention(model) | _rotary(model, share)  # fmt: skip


def _heads(model, layers: list[str]) -> str:
    dim, heads = model.dim, model.attention.num_heads
    fits = dim % heads == 0 or not any('attention' in text for text in layers)
    return '' if fits else f'a model.dim that model.attention.num_heads divides, not {dim} by {heads}'


def _rwkv(model, layers: list[str]) -> Options:
    return {
        'layer_norm_epsilon': model.norm_eps,
        'attention_hidden_size': model.rwkv4.inner_dim,
        'intermediate_size': model.rwkv_channel_mix.hidden_dim,
        'rescale_every': 0,
    }


def _several(model, layers: list[str]) -> str:
    return 'several layers, not 1' if len(layers) == 1 else ''


# By model_type, in the order in which they are tried.
WRITERS = {
    'llama': Writer('LlamaForCausalLM', ('attention+mlp',), _llama, _heads),
    'mixtral': Writer('MixtralForCausalLM', ('attention+moe',), _mixtral, _heads),
    'mamba': Writer('MambaForCausalLM', ('mamba',), _mamba),
    'falcon_mamba': Writer('FalconMambaForCausalLM', ('mamba',), _falcon_mamba),
    'mamba2': Writer('Mamba2ForCausalLM', ('mamba2',), _mamba2),
    'jamba': Writer('JambaForCausalLM', ('mamba+mlp', 'mamba+moe', 'attention+mlp', 'attention+moe'), _jamba, _heads),
    'bamba': Writer('BambaForCausalLM', ('mamba2+mlp', 'attention+mlp'), _bamba, _heads),
    'rwkv': Writer('RwkvForCausalLM', ('rwkv4+rwkv_channel_mix',), _rwkv, _several),
}
