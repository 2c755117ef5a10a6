"""Weights of Hugging Face transformers under our names and in our layout.

The maps only rename, transpose, split and stack, so the same function carries a gradient over.
"""

import re
from collections.abc import Mapping

import numpy as np

Weights = dict[str, np.ndarray]

# Name in transformers -> our name, for weights of linear maps, which are [out, in] there and [in, out] here.
TRANSPOSED = {
    'in_proj.weight': 'in_proj',
    'x_proj.weight': 'x_proj',
    'dt_proj.weight': 'dt_proj',
    'out_proj.weight': 'out_proj',
    'q_proj.weight': 'q_proj',
    'k_proj.weight': 'k_proj',
    'v_proj.weight': 'v_proj',
    'o_proj.weight': 'o_proj',
    'gate_proj.weight': 'w_gate',
    'up_proj.weight': 'w_up',
    'down_proj.weight': 'w_down',
    'router.weight': 'router',  # Jamba
    'gate.weight': 'router',  # Mixtral
}
SAME = {
    'conv1d.bias': 'conv/bias',
    'dt_proj.bias': 'dt_bias',
    'A_log': 'A_log',
    'D': 'D',
    'dt_layernorm.weight': 'dt_norm/scale',
    'b_layernorm.weight': 'B_norm/scale',
    'c_layernorm.weight': 'C_norm/scale',
    'weight': 'scale',  # of a norm alone
}
# Parts of a decoder layer.
PARTS = {
    'mamba': 'mixer',
    'self_attn': 'mixer',
    'feed_forward': 'ffn',
    'mlp': 'ffn',
    'input_layernorm': 'mixer_norm',
    'pre_ff_layernorm': 'ffn_norm',  # Jamba
    'post_attention_layernorm': 'ffn_norm',  # Llama, Mixtral
}
TOP = {
    'model.embed_tokens.weight': 'embedding',
    'model.final_layernorm.weight': 'final_norm/scale',  # Jamba
    'model.norm.weight': 'final_norm/scale',
}


def layer_weights(theirs: Mapping[str, np.ndarray]) -> Weights:
    """Maps the weights of one mixer, FFN or norm."""
    ours: Weights = {}
    for name, value in theirs.items():
        if name in TRANSPOSED:
            ours[TRANSPOSED[name]] = value.T
        elif name in SAME:
            ours[SAME[name]] = value
        elif name == 'conv1d.weight':  # [inner, 1, width] -> [width, inner]
            ours['conv/weight'] = value[:, 0].T
        elif name == 'experts.gate_up_proj':  # [experts, 2 hidden, dim] -> two of [experts, dim, hidden]
            gate, up = np.split(value, 2, axis=1)
            ours |= {'w_gate': gate.swapaxes(1, 2), 'w_up': up.swapaxes(1, 2)}
        elif name == 'experts.down_proj':  # [experts, dim, hidden] -> [experts, hidden, dim]
            ours['w_down'] = value.swapaxes(1, 2)
        else:
            raise KeyError(f'no place is known for the weight {name}')
    return ours


def model_weights(theirs: Mapping[str, np.ndarray], pattern_size: int) -> Weights:
    """Maps the weights of a whole model whose layers repeat every `pattern_size`; repeats are stacked."""
    ours: Weights = {}
    layers: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for name, value in theirs.items():
        if name in TOP:
            ours[TOP[name]] = value
        elif name == 'lm_head.weight':
            ours['output'] = value.T
        elif match := re.fullmatch(r'model\.layers\.(\d+)\.(\w+)\.(.+)', name):
            index, part, rest = match.groups()
            layers.setdefault((int(index), PARTS[part]), {})[rest] = value
        else:
            raise KeyError(f'no place is known for the weight {name}')
    stacks: dict[str, list[np.ndarray]] = {}
    for (index, part), weights in sorted(layers.items()):
        for name, value in layer_weights(weights).items():
            stacks.setdefault(f'blocks/layers/{index % pattern_size}/{part}/{name}', []).append(value)
    return ours | {name: np.stack(values) for name, values in stacks.items()}
