"""MoE-Mamba at the nano size: eight layers of Mamba and Switch (Pióro et al., 2024), active parameters as nano.

8 experts, of which a token uses one; nano's parameters within 2 % are active. The argument is ``parallel``, both side
by side from one normed input, or ``inner``, experts in the place of Mamba's gate projection in every other of 15
layers, and no others. 717k tokens take about two minutes on one CPU core (5.5k tokens/s, beside other runs of a
sweep), with ``parallel`` a minute and a half (8.7k), with ``inner`` three and a half (3.6k).

    mixcon train --config experiments/baselines/moe_mamba.py --workdir runs/moe_mamba
"""

import os
import runpy

from mixcon_jax.models.presets import SWITCH

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))


def get_config(arg=None):
    """Returns the configuration; the argument is nothing, ``parallel`` or ``inner``."""
    patterns = {
        None: ('mamba+moe',) * 8,
        'parallel': ('mamba|moe',) * 8,
        'inner': ('moe_mamba', 'mamba') * 7 + ('moe_mamba',),
    }
    if arg not in patterns:
        raise ValueError(f'unknown argument {arg!r}; it is nothing, "parallel" or "inner"')
    config = NANO['get_config']()
    config.name = f'moe-mamba-nano{f"-{arg}" if arg else ""}'
    model = config.model
    model.pattern = patterns[arg]
    model.moe.update(SWITCH | {'num_experts': 8, 'hidden_dim': 228})
    model.moe_mamba.hidden_dim = 48
    return config
