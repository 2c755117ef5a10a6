"""Pure Mamba-2 at the nano size: eight Mamba-2 mixers (Dao and Gu, 2024) and MLPs, at its parameters within 2 %.

717k tokens take about two minutes on one CPU core: 6.3k tokens/s, beside other runs of a sweep.

    mixcon train --config experiments/baselines/mamba2.py --workdir runs/mamba2
"""

import os
import runpy

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))


def get_config(arg=None):
    """Returns the configuration; there is no argument."""
    if arg is not None:
        raise ValueError(f'unknown argument {arg!r}; there is none')
    config = NANO['get_config']()
    config.name = 'mamba2-nano'
    config.model.pattern = ('mamba2+mlp',) * 8
    config.model.mamba2.d_state = 64
    config.model.mamba2.head_dim = 32
    config.model.mlp.hidden_dim = 147
    return config
