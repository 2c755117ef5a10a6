"""Why does attention extend here, where it is published not to? Induction at one length, without the curriculum.

A follow-up to induction.py, decided on when the first seed of its attention answered most sequences of eight times
the trained length. One suspect is the curriculum: its sequences of 8 to 64 tokens, several in a row, teach every
distance. Here all have 64 tokens, as all of the published task have 256. Three times the steps make up for the easier
beginning that is gone, and two more lengths are scored. Nothing else differs from induction.py.
9 runs, about 25 minutes on 2 CPU cores.

    python -m launch.sweep --config experiments/synthetic/induction_one_length.py --workdir runs/one_length --jobs 2
"""

import os
import runpy

INDUCTION = runpy.run_path(os.path.join(os.path.dirname(__file__), 'induction.py'))
ARMS = ('attention', 'attention RoPE', 'mamba')


def get_config(arg=None):
    """Returns the configuration; the argument names an architecture of base.py."""
    config = INDUCTION['get_config'](arg)
    task = config.data.synthetic
    task.curriculum_steps = task.min_length = task.min_items = 0
    task.eval_lengths = (*task.eval_lengths, 1024, 2048)
    task.eval_rows = 256
    config.train.steps = 4500
    config.eval.every = config.checkpoint.every = 1500
    config.eval.max_rows = 64
    return config


def sweep():
    """Returns three architectures of one seed after the other, with the widths that induction.py gives them."""
    return [case for case in INDUCTION['BASE']['arms'](get_config) if case['name'] in ARMS]
