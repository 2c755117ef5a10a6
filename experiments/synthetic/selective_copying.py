"""Selective copying (Gu and Dao, 2023): find 8 symbols among noise, and give them back in order.

What a time-invariant model cannot do: it has to choose by content what to keep. Models and budget are
those of base.py. 15 runs, about 15 minutes on 2 CPU cores.

    python -m launch.sweep --config experiments/synthetic/selective_copying.py --workdir runs/selective_copying --jobs 2
"""

import os
import runpy

BASE = runpy.run_path(os.path.join(os.path.dirname(__file__), 'base.py'))


def get_config(arg=None):
    """Returns the configuration; the argument names an architecture of base.py."""
    return BASE['get_config'](arg)


def sweep():
    """Returns the architectures of one seed after the other."""
    return BASE['arms'](get_config)
