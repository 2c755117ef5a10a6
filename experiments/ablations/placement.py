"""Where should the attention layers stand? Two of eight: together at the start, in the middle, at the end, or apart.

All arms have the same layers, so parameters and operations per token are equal. 12 runs of 717k tokens: about half
an hour on 2 CPU cores.

    python -m launch.sweep --config experiments/ablations/placement.py --workdir runs/placement --jobs 2
"""

import os
import runpy

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))
ARMS = {  # name: which layers are attention
    'first 0 1': (0, 1),
    'middle 3 4': (3, 4),
    'last 6 7': (6, 7),
    'apart 2 5': (2, 5),
}


def get_config(arg=None):
    """Returns the nano configuration; there is no argument."""
    if arg is not None:
        raise ValueError(f'unknown argument {arg!r}; there is none')
    config = NANO['get_config']()
    config.name = 'placement'
    config.checkpoint.keep_last = 1
    config.log.tensorboard = False
    return config


def sweep():
    """Yields the arms of one seed after the other."""
    for seed in range(3):
        for name, layers in ARMS.items():
            pattern = tuple('attention+mlp' if i in layers else 'conba+mlp' for i in range(8))
            yield {'name': name, 'seed': seed, 'model.pattern': pattern}
