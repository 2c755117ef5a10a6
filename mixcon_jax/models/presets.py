"""Named architectures as plain data: patterns and Conba's presets, spelled out in the config that results."""

CONBA_PRESETS: dict[str, dict] = {
    # Linear core with a per-token matrix gain: the default.
    'conba': {
        'state_scaling': 'output',
        'delay': 'taps',
        'control': 'matrix',
        'reference': 'diag',
        'feedback_iters': 0,
        'gate': 'full',
    },
    # Nearest to the paper's equations: states scaled before the readout, and true feedback onto the input.
    'conba_paper': {
        'state_scaling': 'readout',
        'delay': 'taps',
        'control': 'matrix',
        'reference': 'diag',
        'feedback_iters': 2,
        'gate': 'full',
    },
    # The released code, repaired: learned constant gain, zero reference, Mamba's gate.
    'conba_code': {
        'state_scaling': 'readout',
        'delay': 'state',
        'control': 'slow',
        'reference': 'zero',
        'feedback_iters': 0,
        'gate': 'mamba',
    },
}

# Every mechanism off: Jamba's Mamba mixer. It is what a preset's additions are counted against.
CONBA_OFF = {'state_scaling': 'none', 'delay': 'none', 'control': 'none', 'feedback_iters': 0, 'gate': 'mamba'}

# Published sizes of MoE-Mamba and of what it is compared with (Pióro et al., 2024, tables 1 and 5): layers of
# experts, Mamba layers or attention layers, the experts of a layer and their width.
MOE_MAMBA: dict[str, dict] = {
    'moe-mamba-25m': {'dim': 512, 'num_blocks': 8, 'pattern': ('mamba+moe',), 'experts': 42, 'width': 1536},
    'moe-mamba-100m': {'dim': 768, 'num_blocks': 16, 'pattern': ('mamba+moe',), 'experts': 42, 'width': 2304},
    'mamba-25m': {'dim': 512, 'num_blocks': 16, 'pattern': ('mamba',)},
    'mamba-100m': {'dim': 768, 'num_blocks': 32, 'pattern': ('mamba',)},
    'transformer-moe-25m': {'dim': 512, 'num_blocks': 8, 'pattern': ('attention+moe',), 'experts': 32, 'width': 2048},
    'transformer-moe-100m': {'dim': 768, 'num_blocks': 16, 'pattern': ('attention+moe',), 'experts': 32, 'width': 3072},
}

# Switch's routing and experts (Fedus et al., 2021): one expert a token, of two matrices, with room for an even share.
SWITCH = {'expert': 'relu', 'top_k': 1, 'expert_capacity': 1.0, 'balance': 'loss', 'balance_coef': 0.01}


def conba(preset: str = 'conba') -> dict:
    """Returns the options of a preset, for ``config.model.conba.update(...)``.

    Raises:
      ValueError: an unknown preset.
    """
    if preset not in CONBA_PRESETS:
        raise ValueError(f'unknown Conba preset {preset!r}; choose from {", ".join(CONBA_PRESETS)}')
    return dict(CONBA_PRESETS[preset])


def moe_mamba(name: str) -> dict:
    """Returns the options of a published size, for ``config.model.update(...)``.

    Attention has heads of 64 and rotary positions, Mamba no norms; the vocabulary is GPT-2's.

    Raises:
      ValueError: an unknown name.
    """
    if name not in MOE_MAMBA:
        raise ValueError(f'unknown size {name!r}; choose from {", ".join(MOE_MAMBA)}')
    size = MOE_MAMBA[name]
    heads = size['dim'] // 64
    return {
        'dim': size['dim'],
        'num_blocks': size['num_blocks'],
        'pattern': size['pattern'],
        'vocab_size': 50257,
        'attention': {'num_heads': heads, 'num_kv_heads': heads, 'rope': True},
        'moe': SWITCH | {'num_experts': size.get('experts', 1), 'hidden_dim': size.get('width', 1)},
    }


def hybrid(attention: int, conba: int, moe_every: int = 0, mixer: str = 'conba') -> tuple[str, ...]:
    """Builds a block's pattern: attention layers in its middle, experts on every ``moe_every``-th layer.

    ``hybrid(attention=2, conba=6, moe_every=2)`` is the paper's block (Figure 2): attention at layers 3 and 4, experts
    on the odd layers.

    Args:
      attention: number of attention layers.
      conba: number of Conba layers, or of ``mixer``.
      moe_every: layers with ``(index + 1) % moe_every == 0`` get experts, the others an MLP; 0 gives none.
      mixer: name of the layers that are not attention.
    """
    size = attention + conba
    first = (size - attention + 1) // 2
    mixers = ['attention' if first <= i < first + attention else mixer for i in range(size)]
    ffns = ['moe' if moe_every and (i + 1) % moe_every == 0 else 'mlp' for i in range(size)]
    return tuple(f'{m}+{f}' for m, f in zip(mixers, ffns, strict=True))
