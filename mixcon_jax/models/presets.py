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


def conba(preset: str = 'conba') -> dict:
    """Returns the options of a preset, for ``config.model.conba.update(...)``.

    Raises:
      ValueError: an unknown preset.
    """
    if preset not in CONBA_PRESETS:
        raise ValueError(f'unknown Conba preset {preset!r}; choose from {", ".join(CONBA_PRESETS)}')
    return dict(CONBA_PRESETS[preset])


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
