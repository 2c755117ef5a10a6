"""Every mixer of the family, at equal parameters, equal tokens and paired seeds, each as its own baseline file has it.

Attention without positions, Mamba, Mamba-2, Conba, MixCon 2:6, RetNet, GLA, RWKV-4, 6 and 7, Hyena, StripedHyena, large
kernels and PanGu-π at the nano size, without experts. An arm is its file of experiments/baselines but for the width of
its FFNs, which makes up for the mixers' different sizes, so that every arm has the parameters of 2:6 within 1 %. For
one seed, data order is the same, and so are initial values wherever two arms have a parameter of one name and shape.
All arms share one learning rate, which was found on a hybrid.

42 runs of 717k tokens, 3 seeds of 14 arms: about three hours on 2 CPU cores, one after the other beside other work.

    python -m launch.sweep --config experiments/ablations/family.py --workdir runs/family --jobs 2
"""

import os
import runpy

HERE = os.path.dirname(__file__)
NANO = runpy.run_path(os.path.join(HERE, '../mixcon/nano.py'))
MLP = 'mlp.hidden_dim'
ARMS = {  # name: file of experiments/baselines, its argument, and the width that makes up for the mixer's size
    'attention': ('attention', None, MLP),
    'Mamba': ('mamba', None, MLP),
    'Mamba-2': ('mamba2', None, MLP),
    'Conba': ('conba', None, MLP),
    'MixCon 2:6': (None, None, MLP),
    'RetNet': ('retnet', None, MLP),
    'GLA': ('gla', None, MLP),
    'RWKV-4': ('rwkv4', None, 'rwkv_channel_mix.hidden_dim'),
    'RWKV-6': ('rwkv6', None, 'rwkv_channel_mix.hidden_dim'),
    'RWKV-7': ('rwkv7', None, 'rwkv_channel_mix.hidden_dim'),
    'Hyena': ('hyena', None, MLP),
    'StripedHyena': ('striped_hyena', None, MLP),
    'large kernel': ('large_kernel', None, MLP),
    'PanGu-π': ('pangu_pi', None, MLP),
}


def get_config(arg=None):
    """Returns the nano configuration, of 2:6 without experts; there is no argument."""
    if arg is not None:
        raise ValueError(f'unknown argument {arg!r}; there is none')
    config = NANO['get_config']()
    config.name = 'family'
    config.checkpoint.keep_last = 1
    config.log.tensorboard = False
    config.model.pattern = tuple(layer.replace('+moe', '+mlp') for layer in config.model.pattern)
    config.model.layers = _baseline('large_kernel').model.layers  # its pattern names layers, which an arm cannot add
    return config


def sweep(arg=None):
    """Yields the arms of one seed after the other."""
    from mixcon_jax.models.accounting import parameter_count, width_for  # with it comes JAX

    ours, arms = get_config(arg), []
    target = parameter_count(ours.model).total
    for name, (file, argument, width) in ARMS.items():
        model = (_baseline(file, argument) if file else get_config(arg)).model
        model.layers = ours.model.layers
        group, key = width.split('.')
        model[group][key] = width_for(model, target, width)
        arms.append({'name': name} | _differences('model', model.to_dict(), ours.model.to_dict()))
    for seed in range(3):
        for arm in arms:
            yield arm | {'seed': seed}


def _baseline(file, argument=None):
    """The configuration of a file of experiments/baselines."""
    return runpy.run_path(os.path.join(HERE, f'../baselines/{file}.py'))['get_config'](argument)


def _differences(prefix, ours, others):
    """Options of one configuration that differ in another, by their dotted names."""
    found = {}
    for key, value in ours.items():
        if isinstance(value, dict):
            found |= _differences(f'{prefix}.{key}', value, others.get(key, {}))
        elif key not in others or others[key] != value:
            found[f'{prefix}.{key}'] = value
    return found
