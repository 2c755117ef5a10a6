"""Induction heads (Olsson et al., 2022; here as in Gu and Dao, 2023): what followed the special token before?

Mamba is published to solve it at lengths far beyond those it was trained on, attention only up to twice.
Models and budget are those of base.py. 15 runs, about 15 minutes on 2 CPU cores.

    python -m launch.sweep --config experiments/synthetic/induction.py --workdir runs/induction --jobs 2
"""

import os
import runpy

BASE = runpy.run_path(os.path.join(os.path.dirname(__file__), 'base.py'))


def get_config(arg=None):
    """Returns the configuration; the argument names an architecture of base.py."""
    config = BASE['get_config'](arg)
    config.data.sources = ('synthetic:induction',)
    config.data.synthetic.num_items = 1
    config.data.synthetic.eval_rows = 1024  # with one answer each
    return config


def sweep():
    """Returns the architectures of one seed after the other."""
    return BASE['arms'](get_config)
