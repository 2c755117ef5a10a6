"""Hyena at the nano size: eight layers of order 2 (Poli et al., 2023) and MLPs, at its parameters within 2 %.

717k tokens take about a minute and a half on one CPU core: 8.5k tokens/s, beside other runs of a sweep.

    mixcon train --config experiments/baselines/hyena.py --workdir runs/hyena
"""

import os
import runpy

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))


def get_config(arg=None):
    """Returns the configuration; there is no argument."""
    if arg is not None:
        raise ValueError(f'unknown argument {arg!r}; there is none')
    config = NANO['get_config']()
    config.name = 'hyena-nano'
    config.model.pattern = ('hyena+mlp',) * 8
    config.model.hyena.max_len = config.data.seq_len
    config.model.mlp.hidden_dim = 159
    return config
