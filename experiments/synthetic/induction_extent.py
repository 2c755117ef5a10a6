"""Why does Mamba extend induction less than published? What only the published training has, one thing at a time.

A follow-up to induction.py, decided on after its first seed: there Mamba answers about 2.5 times the trained length,
where published Mamba answers any length and attention twice the trained one. Three suspects, one at a
time, for Mamba and for attention with RoPE: ``one length`` (no curriculum, whose first half hardly needs to
remember), ``256 tokens`` (the published length, with as many tokens a step, hence a quarter of the rows) and ``4 x
steps`` (the curriculum stretched alike; published are 200,000). Nothing else differs, so induction.py's runs of
the same seeds are the baseline. 18 runs, about 25 minutes on 2 CPU cores.

    python -m launch.sweep --config experiments/synthetic/induction_extent.py --workdir runs/induction_extent --jobs 2
    mixcon report runs/induction/mamba runs/induction/attention-RoPE runs/induction_extent --baseline mamba \\
        --out docs/results/induction_extent
"""

import os
import runpy

INDUCTION = runpy.run_path(os.path.join(os.path.dirname(__file__), 'induction.py'))
ARMS = ('mamba', 'attention RoPE')
CHANGES = {
    'one length': {
        'data.synthetic.curriculum_steps': 0,
        'data.synthetic.min_length': 0,
        'data.synthetic.min_items': 0,
    },
    '256 tokens': {'data.seq_len': 256, 'train.batch_size': 4},
    '4 x steps': {'train.steps': 6000, 'data.synthetic.curriculum_steps': 3000},
}


def get_config(arg=None):
    """Returns the configuration of induction.py; the argument names an architecture of base.py."""
    return INDUCTION['get_config'](arg)


def sweep():
    """Returns every change of both architectures, of one seed after the other."""
    return INDUCTION['BASE']['changed'](INDUCTION['sweep'](), ARMS, CHANGES)
