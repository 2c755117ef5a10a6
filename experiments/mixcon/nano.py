"""The smallest MixCon: 0.54M parameters, the size at which ablations are affordable on a laptop.

One block of 8 layers (2 attention, 6 Conba) of width 64, without experts, on the standard library's text with 512 byte
pairs. 717k tokens take 4 to 5 minutes on one CPU core. The argument names a Conba preset.

    mixcon train --config experiments/mixcon/nano.py --workdir runs/mixcon_nano
"""

from mixcon_jax.config import default
from mixcon_jax.models.presets import conba, hybrid


def get_config(arg=None):
    """Returns the configuration; the argument names a Conba preset (``conba``, ``conba_paper``, ``conba_code``)."""
    config = default()
    config.name = 'mixcon-nano'

    model = config.model
    model.vocab_size = 512
    model.dim = 64
    model.pattern = hybrid(attention=2, conba=6)
    model.tie_embeddings = True
    model.attention.num_heads = 4
    model.attention.num_kv_heads = 2
    model.mlp.hidden_dim = 176
    model.conba.update(conba(arg or 'conba'))

    config.data.sources = ('stdlib',)
    config.data.tokenizer_vocab_size = 512
    config.data.seq_len = 128

    config.optim.learning_rate = 4e-3
    config.optim.warmup_steps = 50
    config.train.steps = 700
    config.train.batch_size = 8
    config.train.loss_chunk = 512
    config.eval.every = 100
    config.eval.batch_size = 32
    config.eval.max_rows = 128
    config.checkpoint.every = 350
    config.log.every = 10
    return config
