"""MoE-Mamba at its published 25M: 8 layers of Mamba and Switch, 542M parameters without embeddings, 26M active.

Sizes, and what is said of training, are those of Pióro et al., 2024 (tables 1 and 5): 150k steps of 64 rows of 1024
tokens, 9.8B tokens of C4 with GPT-2's vocabulary, whose embedding and head make it 594M parameters, and a peak
learning rate of 5e-4 (of Mamba alone 1e-3). These are 3.1e+18 FLOPs: 2.2 hours of one H100 at 40 % MFU, which is an
assumption and no measurement; parameters, gradients and AdamW's moments take 9.5 GB. Initial values are this
project's, not the paper's. It wants your own text: set ``data.sources``. Compiled for 8 H100s it takes 11.2 GiB of
each at the peak (``mixcon plan``); no GPU has run it.

    mixcon train --config experiments/moe_mamba/25m.py --workdir runs/moe_mamba_25m
"""

from mixcon_jax.config import default
from mixcon_jax.models.presets import moe_mamba

ARGUMENTS = (None, 'parallel', 'mamba', 'transformer-moe')


def get_config(arg=None):
    """Returns the configuration.

    The argument is nothing; ``parallel``, Mamba and experts side by side; or what the paper compares with: ``mamba``
    (16 layers) or ``transformer-moe``.
    """
    if arg not in ARGUMENTS:
        raise ValueError(f'unknown argument {arg!r}; choose from {", ".join(map(str, ARGUMENTS[1:]))}, or give none')
    config = default()
    kind = 'moe-mamba' if arg in (None, 'parallel') else arg
    config.name = f'{kind}-25M{"-parallel" if arg == "parallel" else ""}'

    model = config.model
    model.update(moe_mamba(f'{kind}-25m'))
    if arg == 'parallel':
        model.pattern = ('mamba|moe',)
    model.dtype = 'bfloat16'
    model.remat = 'selective'

    config.data.sources = ('files:/data/text/*.jsonl.zst',)  # yours
    config.data.tokenizer_vocab_size = 50257
    config.data.seq_len = 1024

    config.optim.learning_rate = 1e-3 if arg == 'mamba' else 5e-4
    config.optim.warmup_steps = 1500
    config.optim.clip_norm = 0.5
    config.train.steps = 150_000
    config.train.batch_size = 64
    config.train.loss_chunk = 4096
    config.checkpoint.every = 5000
    config.eval.every = 5000
    config.eval.max_rows = 256
    return config
