"""Experts against dense FFNs at equal active parameters: how many, and how many at a time.

The nano model (2 attention, 6 Conba layers) with the MLP on every layer, or with experts in its place on every second
one. One token's experts are together as wide as the MLP, so that all arms have the same active parameters but for the
router (0.1 to 0.4 %), and about the same operations per token; the total grows with the number of experts.

12 runs of 717k tokens: about 30 minutes on 2 CPU cores.

    python -m launch.sweep --config experiments/ablations/moe.py --workdir runs/moe --jobs 2
"""

import os
import runpy

from mixcon_jax.models.presets import hybrid

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))
ARMS = {  # name: experts, of which a token uses
    'dense': (0, 0),
    '4 experts, top 1': (4, 1),
    '8 experts, top 1': (8, 1),
    '4 experts, top 2': (4, 2),
}


def get_config(arg=None):
    """Returns the nano configuration; there is no argument."""
    if arg is not None:
        raise ValueError(f'unknown argument {arg!r}; there is none')
    config = NANO['get_config']()
    config.name = 'moe'
    config.checkpoint.keep_last = 1
    config.log.tensorboard = False
    return config


def sweep():
    """Yields the arms of one seed after the other."""
    width = get_config().model.mlp.hidden_dim
    for seed in range(3):
        for name, (experts, top_k) in ARMS.items():
            case = {'name': name, 'seed': seed, 'model.pattern': hybrid(2, 6, moe_every=2 if experts else 0)}
            if experts:
                case |= {
                    'model.moe.num_experts': experts,
                    'model.moe.top_k': top_k,
                    'model.moe.hidden_dim': width // top_k,
                }
            yield case
