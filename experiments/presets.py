"""A published model by its name: sizes as published, with a usual recipe that no paper of these gives in full.

`mixcon presets` lists the names, with their parameters and the memory of decoding. The recipe (AdamW, a peak learning
rate that falls with the width, rows of 4096 tokens) is of the usual kind and not tuned. mamba-130m's 105B tokens
are 8e+19 FLOPs, 58 hours of one H100 at 40 % MFU, which is an assumption and no measurement; most others need a
cluster, and `mixcon plan` says which. It wants your own text: set ``data.sources``.

    mixcon train --config experiments/presets.py:mamba-130m --workdir runs/mamba_130m
"""

from mixcon_jax.config import default
from mixcon_jax.models.sizes import size


def get_config(arg='mamba-130m'):
    """Returns the configuration; the argument is a name of `mixcon presets`."""
    config = default()
    config.name = arg or 'mamba-130m'
    model = config.model
    model.update(size(config.name).options)
    model.dtype = 'bfloat16'
    model.remat = 'selective'

    config.data.sources = ('files:/data/text/*.jsonl.zst',)  # yours
    config.data.tokenizer_vocab_size = model.vocab_size
    config.data.seq_len = 4096
    config.optim.learning_rate = min(6e-4, 6e-4 * 768 / model.dim)
    config.optim.warmup_steps = 2000
    config.train.steps = 100_000
    config.train.batch_size = 256
    config.train.loss_chunk = 4096
    config.mesh.data, config.mesh.fsdp = 1, -1  # parameters shared out by all devices
    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.max_rows = 256
    return config
