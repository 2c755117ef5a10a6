"""Does Mamba lack steps at selective copying? Four times the budget for the two arms that were still learning.

A follow-up to selective_copying.py, decided on after its three seeds: at the trained length Mamba gives 0.88 of the
symbols back, where published Mamba gives 0.998, and attention without positions 0.85, where all other arms are near
1; both were still rising when the budget ended. ``4 x steps`` stretches the curriculum alike (published are 400,000
steps). Nothing else differs, so selective_copying.py's runs of the same seeds are the baseline. 6 runs, about 10
minutes on 2 CPU cores.

    python -m launch.sweep --config experiments/synthetic/selective_copying_extent.py \\
        --workdir runs/selective_copying_extent --jobs 2
    mixcon report runs/selective_copying/mamba runs/selective_copying/attention runs/selective_copying_extent \\
        --baseline mamba --out docs/results/selective_copying_extent
"""

import os
import runpy

COPYING = runpy.run_path(os.path.join(os.path.dirname(__file__), 'selective_copying.py'))
ARMS = ('mamba', 'attention')
CHANGES = {'4 x steps': {'train.steps': 6000, 'data.synthetic.curriculum_steps': 3000}}


def get_config(arg=None):
    """Returns the configuration of selective_copying.py; the argument names an architecture of base.py."""
    return COPYING['get_config'](arg)


def sweep():
    """Returns the longer training of both architectures, of one seed after the other."""
    return COPYING['BASE']['changed'](COPYING['sweep'](), ARMS, CHANGES)
