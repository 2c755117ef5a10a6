"""MoE-Mamba at its published 100M: 16 layers of Mamba and Switch, 2439M parameters without embeddings, 117M active.

Sizes, and what is said of training, are those of Pióro et al., 2024 (tables 1 and 5): 30k steps of 1024 rows of 1024
tokens, 31B tokens of C4 with GPT-2's vocabulary, whose embedding and head make it 2516M parameters, and a peak
learning rate of 5e-4 (of Mamba alone 1e-3, of attention 2.5e-4). These are 3.0e+19 FLOPs: 21 hours of one H100 at 40 %
MFU, which is an assumption and no measurement; parameters, gradients and AdamW's moments take 40 GB. Initial values
are this project's, not the paper's. It wants your own text: set ``data.sources``. ``mesh.fsdp`` is 8: it takes a
multiple of 8 devices. Compiled for 8 H100s it takes 33.4 GiB of each at the peak (``mixcon plan``); no GPU has run it.
Experts have room for an even share of a microbatch, 256 rows.

    mixcon train --config experiments/moe_mamba/100m.py --workdir runs/moe_mamba_100m
"""

from mixcon_jax.config import default
from mixcon_jax.models.presets import moe_mamba

ARGUMENTS = (None, 'parallel', 'mamba', 'transformer-moe')


def get_config(arg=None):
    """Returns the configuration.

    The argument is nothing; ``parallel``, Mamba and experts side by side; or what the paper compares with: ``mamba``
    (32 layers) or ``transformer-moe``.
    """
    if arg not in ARGUMENTS:
        raise ValueError(f'unknown argument {arg!r}; choose from {", ".join(map(str, ARGUMENTS[1:]))}, or give none')
    config = default()
    config.name = f'{arg}-100M' if arg and arg != 'parallel' else f'moe-mamba-100M{"-parallel" if arg else ""}'

    model = config.model
    model.update(moe_mamba(f'{arg if arg and arg != "parallel" else "moe-mamba"}-100m'))
    if arg == 'parallel':
        model.pattern = ('mamba|moe',)
    model.dtype = 'bfloat16'
    model.remat = 'selective'

    config.data.sources = ('files:/data/text/*.jsonl.zst',)  # yours
    config.data.tokenizer_vocab_size = 50257
    config.data.seq_len = 1024

    config.optim.learning_rate = {'mamba': 1e-3, 'transformer-moe': 2.5e-4}.get(arg, 5e-4)
    config.optim.warmup_steps = 300
    config.optim.clip_norm = 0.5
    config.train.steps = 30_000
    config.train.batch_size = 1024
    config.train.accum_steps = 4
    config.train.loss_chunk = 4096
    config.mesh.fsdp = 8
    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.max_rows = 256
    return config
