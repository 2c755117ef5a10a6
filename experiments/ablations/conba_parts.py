"""What each of Conba's mechanisms does: scaling, delay, control, gate and feedback, one at a time.

The nano model (2 attention, 6 Conba layers) with every mechanism off, which leaves Jamba's Mamba mixer; with one of
them on; and with those of the ``conba`` preset together. Feedback acts through a gain, so its arm compares with
``+control``. The width of the MLPs makes all arms equal in parameters within 2 %; an override of a model option holds
for the arms but not for that computation.

21 runs of 717k tokens: about 50 minutes on 2 CPU cores.

    python -m launch.sweep --config experiments/ablations/conba_parts.py --workdir runs/parts --jobs 2
"""

import os
import runpy

from mixcon_jax.models.presets import CONBA_OFF, conba

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))
ARMS = {
    'none': {},
    '+scaling': {'state_scaling': 'output'},
    '+delay': {'delay': 'taps'},
    '+control': {'control': 'matrix'},
    '+gate': {'gate': 'full'},
    '+control +feedback': {'control': 'matrix', 'feedback_iters': 2},
    'conba': conba('conba'),
}


def get_config(arg=None):
    """Returns the nano configuration; there is no argument."""
    if arg is not None:
        raise ValueError(f'unknown argument {arg!r}; there is none')
    config = NANO['get_config']()
    config.name = 'conba-parts'
    config.checkpoint.keep_last = 1
    config.log.tensorboard = False
    return config


def sweep():
    """Yields the arms of one seed after the other."""
    from mixcon_jax.models.accounting import parameter_count, width_for  # with it comes JAX

    config = get_config()
    target, arms = parameter_count(config.model).total, []
    for name, changes in ARMS.items():
        options = CONBA_OFF | changes
        config.model.conba.update(options)
        arms.append(
            {'name': name, 'model.mlp.hidden_dim': width_for(config.model, target)}
            | {f'model.conba.{key}': value for key, value in options.items()}
        )
    for seed in range(3):
        for arm in arms:
            yield arm | {'seed': seed}
