"""StripedHyena at the nano size: modal Hyena and attention in turn, and MLPs, at its parameters within 2 %.

As in StripedHyena-7B (Together, 2023): two complex modes a channel, short convolutions of width 3, rotary positions.
717k tokens take about a minute and a half on one CPU core: 9.8k tokens/s, beside other runs of a sweep.

    mixcon train --config experiments/baselines/striped_hyena.py --workdir runs/striped-hyena
"""

import os
import runpy

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))


def get_config(arg=None):
    """Returns the configuration; there is no argument."""
    if arg is not None:
        raise ValueError(f'unknown argument {arg!r}; there is none')
    config = NANO['get_config']()
    config.name = 'striped-hyena-nano'
    config.model.pattern = ('hyena_modal+mlp', 'attention+mlp') * 4
    config.model.attention.rope = True
    config.model.attention.rope_theta = 500_000.0
    config.model.mlp.hidden_dim = 248
    return config
