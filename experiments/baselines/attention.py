"""Pure attention at the nano size, without positions or with RoPE: what every hybrid is compared with.

Eight attention layers; the MLP's width makes up for the smaller mixers, so that it has nano's parameters within 2 %.
717k tokens take about 2 minutes on one CPU core. The argument ``rope`` turns on rotary positions.

    mixcon train --config experiments/baselines/attention.py --workdir runs/attention
"""

import os
import runpy

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))


def get_config(arg=None):
    """Returns the configuration; the argument is nothing (NoPE) or ``rope``."""
    if arg not in (None, 'rope'):
        raise ValueError(f'unknown argument {arg!r}; it is nothing or "rope"')
    config = NANO['get_config']()
    config.name = 'attention-nano' + (f'-{arg}' if arg else '')
    config.model.pattern = ('attention+mlp',) * 8
    config.model.attention.rope = arg == 'rope'
    config.model.mlp.hidden_dim = 263
    return config
