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

import os
import runpy

from mixcon_jax.models.presets import moe_mamba

SMALL = runpy.run_path(os.path.join(os.path.dirname(__file__), '25m.py'))


def get_config(arg=None):
    """Returns the configuration of 25m.py at this size; the argument is as there, of which ``mamba`` has 32 layers."""
    config = SMALL['get_config'](arg)
    config.name = config.name.replace('25M', '100M')
    config.model.update(moe_mamba(config.name.lower().removesuffix('-parallel')) | {'pattern': config.model.pattern})

    config.optim.learning_rate = {'mamba': 1e-3, 'transformer-moe': 2.5e-4}.get(arg, 5e-4)
    config.optim.warmup_steps = 300
    config.train.steps = 30_000
    config.train.batch_size = 1024
    config.train.accum_steps = 4
    config.mesh.fsdp = 8
    config.checkpoint.every = 1000
    config.eval.every = 1000
    return config
