"""PanGu-pi at the nano size: attention with augmented shortcuts and a series of activations in the MLP.

Pure attention (experiments/baselines/attention.py) with both additions, whose parameters the MLP's width makes up for.
The argument is one addition alone, ``shortcut`` or ``series``. 717k tokens take about 2 minutes on one CPU core.

    mixcon train --config experiments/baselines/pangu_pi.py --workdir runs/pangu-pi
"""

import os
import runpy

ATTENTION = runpy.run_path(os.path.join(os.path.dirname(__file__), 'attention.py'))


def get_config(arg=None):
    """Returns the configuration; the argument is nothing (both), ``shortcut`` or ``series``."""
    if arg not in (None, 'shortcut', 'series'):
        raise ValueError(f'unknown argument {arg!r}; it is nothing, "shortcut" or "series"')
    config = ATTENTION['get_config']()
    config.name = 'pangu-pi-nano' + (f'-{arg}' if arg else '')
    config.model.mlp.hidden_dim = {None: 256, 'shortcut': 262, 'series': 258}[arg]
    if arg != 'series':
        config.model.shortcut.reduction = 32
    if arg != 'shortcut':
        config.model.pattern = ('attention+series_mlp',) * 8
    return config
