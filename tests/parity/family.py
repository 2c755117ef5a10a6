"""Weights of Mamba-2 of Hugging Face transformers under our names: one map there holds five of ours."""

import numpy as np

from mixcon_jax.models.published import Weights
from tests.parity.cases import below


def mamba2(theirs: Weights, inner: int, keys: int) -> Weights:
    """A mixer's weights, or their gradients.

    Args:
      theirs: by their names in `Mamba2Mixer`.
      inner: the inner width; keys: groups times states.
    """
    ours = {}
    for name, value in theirs.items():
        if name == 'in_proj.weight':
            z, u, B, C, dt = np.split(value.T, np.cumsum([inner, inner, keys, keys]), axis=1)
            ours |= {'in_proj': np.concatenate([u, z], 1), 'B_proj': B, 'C_proj': C, 'dt_proj': dt}
        elif name.startswith('conv1d.'):
            leaf = name.removeprefix('conv1d.')
            flat = value[:, 0].T if leaf == 'weight' else value
            parts = np.split(flat, [inner, inner + keys], axis=-1)
            ours |= {f'{conv}/{leaf}': part for conv, part in zip(('conv', 'conv_B', 'conv_C'), parts, strict=True)}
        else:
            leaf = name.removesuffix('.weight')
            ours[leaf] = value.T if leaf == 'out_proj' else value
    return ours


def mamba2_model(theirs: Weights, layers: int, inner: int, keys: int) -> Weights:
    """A whole model's weights, the layers stacked as blocks."""
    ours = {
        'embedding': theirs['backbone.embeddings.weight'],
        'final_norm/scale': theirs['backbone.norm_f.weight'],
        'output': theirs['lm_head.weight'].T,
    }
    stacks: dict[str, list[np.ndarray]] = {}
    for i in range(layers):
        prefix = f'backbone.layers.{i}.'
        found = {name.removeprefix(prefix): value for name, value in theirs.items() if name.startswith(prefix)}
        mixer = mamba2(below({name.replace('.', '/', 1): v for name, v in found.items()}, 'mixer'), inner, keys)
        parts = {f'mixer/{name}': value for name, value in mixer.items()} | {'mixer_norm/scale': found['norm.weight']}
        for name, value in parts.items():
            stacks.setdefault(f'blocks/layers/0/{name}', []).append(value)
    return ours | {name: np.stack(values) for name, values in stacks.items()}
