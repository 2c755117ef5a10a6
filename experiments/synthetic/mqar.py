"""Multi-query associative recall (Arora et al., 2023): 8 pairs of key and value; each key again: which value?

What attention does by looking back, and a recurrence only as far as its state holds the pairs.
32 keys and 32 values, where the published task has thousands, and noise between the queries where that has random
tokens. At lengths beyond the trained one, queries stand anywhere. Models and budget
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
    config.data.synthetic.symbols = 64
    config.model.vocab_size = 68
    return config


def sweep():
    """Returns the architectures of one seed after the other."""
    return BASE['arms'](get_config)
