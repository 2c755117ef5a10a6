"""MoE-Mamba's claims at the nano size: how many experts beat plain Mamba, and where they are best put.

Pióro et al. (2024) find that loss falls with the number of experts, and that layers of Mamba and Switch need between
4 and 8 of them to be better than Mamba alone; that both side by side are a little worse than one after the other; and
that experts inside Mamba gain hardly anything. Here are 16 layers of Mamba; 8 of Mamba, each before a layer of 1, 4, 8
or 16 experts, of which a token uses one; those with 8, side by side; and 16 layers of Mamba with 29 experts, a quarter
as large, in the place of every other layer's projection to the convolution, of the gate, or of the output. But for the
router, at most 3 % of the rest, all have Mamba's active parameters within 1 %; the arms of 8 experts and those inside
have equal totals within 1 %. Experts have room for an even share of a microbatch, 1024 tokens; what is held out is
scored without that limit. All arms share one learning rate, which was found on a hybrid; the paper tunes it.

27 runs of 717k tokens, 3 seeds of 9 arms: 1.3 hours on 2 CPU cores, one after the other beside other work.

    python -m launch.sweep --config experiments/ablations/moe_mamba.py --workdir runs/moe_mamba --jobs 2
"""

import os
import runpy

from mixcon_jax.models.presets import SWITCH

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))
INSIDE = ('moe_mamba', 'mamba') * 8
ARMS = {  # name: pattern, experts, and the projection that they take the place of
    'Mamba': (('mamba',) * 16, 0, None),
    '1 expert': (('mamba+moe',) * 8, 1, None),
    '4 experts': (('mamba+moe',) * 8, 4, None),
    '8 experts': (('mamba+moe',) * 8, 8, None),
    '16 experts': (('mamba+moe',) * 8, 16, None),
    '8 experts, parallel': (('mamba|moe',) * 8, 8, None),
    'inside: conv': (INSIDE, 29, 'conv'),
    'inside: gate': (INSIDE, 29, 'gate'),
    'inside: output': (INSIDE, 29, 'output'),
}


def get_config(arg=None):
    """Returns the nano configuration with Mamba alone, and Switch's routing; there is no argument."""
    if arg is not None:
        raise ValueError(f'unknown argument {arg!r}; there is none')
    config = NANO['get_config']()
    config.name = 'moe-mamba-claims'
    config.checkpoint.keep_last = 1
    config.log.tensorboard = False
    config.model.pattern = ARMS['Mamba'][0]
    config.model.moe.update(SWITCH)
    return config


def sweep():
    """Yields the arms of one seed after the other."""
    from mixcon_jax.models.accounting import parameter_count, width_for  # with it comes JAX

    model = get_config().model
    target = parameter_count(model).total
    model.pattern, model.moe.num_experts = ARMS['1 expert'][:2]
    width = width_for(model, target, 'moe.hidden_dim')
    for seed in range(3):
        for name, (pattern, experts, projection) in ARMS.items():
            case = {'name': name, 'seed': seed, 'model.pattern': pattern}
            if experts:
                case |= {'model.moe.num_experts': experts, 'model.moe.hidden_dim': width}
            if projection:
                case['model.moe_mamba.projections'] = (projection,)
            yield case
