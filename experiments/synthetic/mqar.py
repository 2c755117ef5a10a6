"""Multi-query associative recall (Arora et al., 2023): 8 pairs of key and value, then every key again: which value?

What attention does by looking back, and a recurrence only as far as its state holds the pairs. Models and budget
are those of base.py. 15 runs, about 15 minutes on 2 CPU cores.

    python -m launch.sweep --config experiments/synthetic/mqar.py --workdir runs/mqar --jobs 2
"""

import os
import runpy

BASE = runpy.run_path(os.path.join(os.path.dirname(__file__), 'base.py'))


def get_config(arg=None):
    """Returns the configuration; the argument names an architecture of base.py."""
    config = BASE['get_config'](arg)
    config.data.sources = ('synthetic:mqar',)
    return config


def sweep():
    """Yields the architectures of one seed after the other."""
    for seed in range(3):
        for name in BASE['ARCHITECTURES']:
            config = get_config(name)
            yield {
                'name': name,
                'seed': seed,
                'model.pattern': config.model.pattern,
                'model.attention.rope': config.model.attention.rope,
            }
