"""The synthetic tasks for what the tasks' own sweeps do not have: the other recurrences, convolutions, PanGu-pi.

The argument is a task: ``selective_copying``, ``induction`` or ``mqar``. Models and budget are those of base.py: four
layers, each a mixer and an MLP, whose width makes all arms equal in parameters; states and filters are small enough for
that. Mamba is run beside them, as the task's own file has it, to be their baseline; attention, Conba and 2:6 of the
same seeds are in that file's report. PanGu-pi is that file's attention with RoPE, with shortcuts of width 4 around it
and a series of activations. ``moe_mamba`` is left out: with equal parameters it would have fewer active ones.

33 runs a task, 11 architectures of 3 seeds, two to ten minutes each: about an hour on 2 CPU cores.

    python -m launch.sweep --config experiments/synthetic/family.py:mqar --workdir runs/mqar_family --jobs 2
    mixcon report runs/mqar_family --baseline mamba --out docs/results/mqar_family
"""

import os
import runpy

TASKS = ('selective_copying', 'induction', 'mqar')
ARMS = {  # name: its layer, and the options below config.model in which it differs from the defaults
    'mamba': ('mamba+mlp', {}),
    'mamba2': ('mamba2+mlp', {'mamba2.d_state': 16, 'mamba2.head_dim': 16}),
    'retnet': ('retnet+mlp', {}),
    'gla': ('gla+mlp', {}),
    'rwkv4': ('rwkv4+mlp', {}),
    'rwkv6': ('rwkv6+mlp', {'rwkv6.mix_rank': 8, 'rwkv6.decay_rank': 8}),
    'rwkv7': ('rwkv7+mlp', {'rwkv7.decay_rank': 8, 'rwkv7.rate_rank': 8, 'rwkv7.gate_rank': 16}),
    'large_kernel': ('large_kernel+mlp', {'large_kernel.kernel': 31}),
    'hyena': ('hyena+mlp', {'hyena.max_len': 512, 'hyena.filter_width': 16, 'hyena.frequency': 10.0}),
    'hyena_modal': ('hyena_modal+mlp', {}),
    'pangu_pi': ('attention+series_mlp', {'attention.rope': True, 'shortcut.reduction': 8}),
}


def get_config(arg='mqar'):
    """Returns the configuration of a task, 2:6; the argument names the task."""
    if arg not in TASKS:
        raise ValueError(f'unknown task {arg!r}; choose from {", ".join(TASKS)}')
    return runpy.run_path(os.path.join(os.path.dirname(__file__), f'{arg}.py'))['get_config']()


def sweep(arg='mqar'):
    """Yields the architectures of one seed after the other, with the parameters of 2:6."""
    from mixcon_jax.models.accounting import parameter_count, width_for  # with it comes JAX

    total, arms = parameter_count(get_config(arg).model).total, []
    for name, (layer, options) in ARMS.items():
        model = get_config(arg).model
        model.pattern = (layer,) * 4
        for key, value in options.items():
            group, option = key.split('.')
            model[group][option] = value
        arms.append(
            {'name': name, 'model.pattern': model.pattern, 'model.mlp.hidden_dim': width_for(model, total)}
            | {f'model.{key}': value for key, value in options.items()}
        )
    for seed in range(3):
        for arm in arms:
            yield arm | {'seed': seed}
