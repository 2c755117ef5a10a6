"""The models and the budget that the synthetic tasks share: small enough for a CPU, and fixed before anything was run.

Four layers of width 32, each a mixer and an MLP; the MLP's width makes all arms equal in parameters (2:6 has 62,000
with 16 symbols). Sequences of at most 64 tokens, where the published versions train on 256 (induction) to 4096
(selective copying) with up to 400,000 steps; the shorter sequences and a curriculum (from 8 tokens with one item, over
the first half of the steps) are to make 1500 steps of at most 1024 tokens enough to tell architectures apart. Scored at
64, 128, 256 and 512 tokens: up to eight times the trained length. The argument names an architecture; the task here is
selective copying.

By itself one run of it; fifteen take about 15 minutes on 2 CPU cores:

    mixcon train --config experiments/synthetic/base.py --workdir runs/synthetic
"""

from mixcon_jax.config import default

ARCHITECTURES = {  # name: mixers, RoPE
    'attention': (('attention',) * 4, False),
    'attention RoPE': (('attention',) * 4, True),
    'mamba': (('mamba',) * 4, False),
    'conba': (('conba',) * 4, False),
    '2:6': (('conba', 'attention', 'conba', 'conba'), False),
}


def get_config(arg=None):
    """Returns the configuration; the argument is one of ARCHITECTURES (default: 2:6, one layer in four attention)."""
    config = default()
    config.name = arg or '2:6'
    if config.name not in ARCHITECTURES:
        raise ValueError(f'unknown architecture {arg!r}; known: {", ".join(ARCHITECTURES)}')
    mixers, rope = ARCHITECTURES[config.name]

    model = config.model
    model.vocab_size = 20
    model.dim = 32
    model.pattern = tuple(f'{mixer}+mlp' for mixer in mixers)
    model.mlp.hidden_dim = 64
    model.attention.num_heads = 2
    model.attention.num_kv_heads = 2
    model.attention.rope = rope

    config.data.sources = ('synthetic:selective_copying',)
    config.data.seq_len = 64
    task = config.data.synthetic
    task.symbols = 16
    task.num_items = 8
    task.min_items = 1
    task.min_length = 8
    task.curriculum_steps = 750
    task.eval_lengths = (64, 128, 256, 512)
    task.eval_rows = 256

    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 0.0
    config.train.steps = 1500
    config.train.batch_size = 16
    config.eval.every = 500
    config.eval.batch_size = 32
    config.eval.max_rows = 128
    config.checkpoint.every = 750
    config.checkpoint.keep_last = 1
    config.log.tensorboard = False
    return config


def arms(get_config):
    """The cases of a task's sweep: the architectures of one seed after the other, with the parameters of 2:6."""
    from mixcon_jax.models.accounting import parameter_count, width_for  # with it comes JAX

    total = parameter_count(get_config().model).total
    models = {name: get_config(name).model for name in ARCHITECTURES}
    made = [
        {
            'name': name,
            'model.pattern': model.pattern,
            'model.attention.rope': model.attention.rope,
            'model.mlp.hidden_dim': width_for(model, total),
        }
        for name, model in models.items()
    ]
    return [arm | {'seed': seed} for seed in range(3) for arm in made]


def changed(arms, names, changes):
    """The cases of a follow-up: those of ``arms`` with one of these names, with every change ``{name: overrides}``."""
    return [
        arm | {'name': f'{arm["name"]}, {name}'} | change
        for arm in arms
        if arm['name'] in names
        for name, change in changes.items()
    ]
