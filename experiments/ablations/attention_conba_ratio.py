"""Which share of attention does a small model want? Five ratios at equal parameters, equal tokens and paired seeds.

Attention:Conba 8:0 (without positions, and with RoPE), 4:4, 2:6, 1:7 and 0:8 at the nano size, without experts. The
width of the MLPs makes up for the mixers' different sizes, so that every arm has the parameters of 2:6 within 2 %; an
override of a model option holds for the arms but not for that computation. For one seed, data order is the same, and so
are initial values wherever two arms have a parameter of one name and shape: not those of the MLPs. All arms share one
learning rate, which was found on a hybrid.

30 runs of 717k tokens: about an hour on 2 CPU cores. With the argument ``long``: 2:6, 0:8 and RoPE attention at 4.1M
tokens, 2 seeds: another hour.

    python -m launch.sweep --config experiments/ablations/attention_conba_ratio.py --workdir runs/ratio --jobs 2
"""

import os
import runpy

from mixcon_jax.models.presets import hybrid

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))
ARMS = {  # name: attention layers of 8, RoPE
    '8:0 NoPE': (8, False),
    '8:0 RoPE': (8, True),
    '4:4': (4, False),
    '2:6': (2, False),
    '1:7': (1, False),
    '0:8': (0, False),
}
LONG = ('8:0 RoPE', '2:6', '0:8')


def get_config(arg=None):
    """Returns the nano configuration; the argument is nothing or ``long``."""
    if arg not in (None, 'long'):
        raise ValueError(f'unknown argument {arg!r}; it is nothing or "long"')
    config = NANO['get_config']()
    config.name = 'attention-conba-ratio'
    config.checkpoint.keep_last = 1
    config.log.tensorboard = False
    if arg == 'long':
        config.train.steps = 4000
        config.eval.every = 250
        config.checkpoint.every = 500
    return config


def sweep(arg=None):
    """Yields the arms of one seed after the other."""
    from mixcon_jax.models.accounting import parameter_count, width_for  # with it comes JAX

    arms = []
    config = get_config(arg)
    target = parameter_count(config.model).total
    for name in LONG if arg == 'long' else ARMS:
        attention, rope = ARMS[name]
        config.model.pattern = hybrid(attention=attention, conba=8 - attention)
        config.model.attention.rope = rope
        width = width_for(config.model, target)
        arms.append(
            {
                'name': name,
                'model.pattern': config.model.pattern,
                'model.attention.rope': rope,
                'model.mlp.hidden_dim': width,
            }
        )
    for seed in range(2 if arg == 'long' else 5):
        for arm in arms:
            yield arm | {'seed': seed}
