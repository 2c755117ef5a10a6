"""A Jamba-like hybrid at the nano size: one attention layer of eight, Mamba with norms, experts on odd layers.

The pattern is Jamba's (Lieber et al., 2024): attention is layer 4 of 8, and top-2 experts with unnormalised weights
take the place of every second MLP. As many active parameters as nano within 2 %; with 4 experts, 0.67M in total. 717k
tokens take about 5 minutes on one CPU core.

    mixcon train --config experiments/baselines/jamba.py --workdir runs/jamba
"""

import os
import runpy

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))


def get_config(arg=None):
    """Returns the configuration; there is no argument."""
    if arg is not None:
        raise ValueError(f'unknown argument {arg!r}; there is none')
    config = NANO['get_config']()
    config.name = 'jamba-nano'
    model = config.model
    model.pattern = (
        'mamba+mlp', 'mamba+moe', 'mamba+mlp', 'mamba+moe', 'attention+mlp', 'mamba+moe', 'mamba+mlp', 'mamba+moe',
    )  # fmt: skip
    model.mamba.norms = True
    model.moe.num_experts = 4
    model.moe.top_k = 2
    model.mlp.hidden_dim = 170
    model.moe.hidden_dim = 85
    return config
