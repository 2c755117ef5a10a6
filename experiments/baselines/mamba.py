"""Pure Mamba at the nano size: eight Mamba mixers (Gu and Dao, 2023) and MLPs, at its parameters within 2 %.

717k tokens take about two minutes on one CPU core: 6.2k tokens/s, beside other runs of a sweep.
The argument ``norms`` adds Jamba's RMSNorms on dt, B and C.

    mixcon train --config experiments/baselines/mamba.py --workdir runs/mamba
"""

import os
import runpy

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))


def get_config(arg=None):
    """Returns the configuration; the argument is nothing or ``norms``."""
    if arg not in (None, 'norms'):
        raise ValueError(f'unknown argument {arg!r}; it is nothing or "norms"')
    config = NANO['get_config']()
    config.name = 'mamba-nano' + (f'-{arg}' if arg else '')
    config.model.pattern = ('mamba+mlp',) * 8
    config.model.mamba.norms = arg == 'norms'
    config.model.mlp.hidden_dim = 157
    return config
