"""MixCon at 350M parameters: one block of 8 layers (2 attention, 6 Conba), 8 experts (top-2) on odd layers.

347M parameters, 173M active. 3.5B tokens, 20 per active parameter, are 3.7e+18 FLOPs: 2.6 hours of one H100
at 40 % MFU, which is an assumption and no measurement. Parameters, gradients and AdamW's moments take 5.6 GB in all.
``mesh.fsdp`` is 8: it takes a multiple of 8 devices. Compiled for 8 H100s, each with 32 rows at once, it takes 39.8
GiB of each (``mixcon plan``). Learning rate and batch are of the usual size, not tuned. It wants your own text: set
``data.sources``.

    mixcon train --config experiments/mixcon/350m.py --workdir runs/mixcon_350m
"""

from mixcon_jax.config import default
from mixcon_jax.models.presets import conba, hybrid


def get_config(arg=None):
    """Returns the configuration; the argument names a Conba preset (``conba``, ``conba_paper``, ``conba_code``)."""
    config = default()
    config.name = 'mixcon-350M'

    model = config.model
    model.vocab_size = 32768
    model.dim = 1024
    model.num_blocks = 1
    model.pattern = hybrid(attention=2, conba=6, moe_every=2)
    model.tie_embeddings = True
    model.dtype = 'bfloat16'
    model.attention.num_heads = 16
    model.attention.num_kv_heads = 4
    model.mlp.hidden_dim = 2816
    model.moe.num_experts = 8
    model.moe.top_k = 2
    model.moe.hidden_dim = 2368
    model.moe.router_z_coef = 1e-3
    model.conba.update(conba(arg or 'conba'))

    config.data.sources = ('files:/data/text/*.jsonl.zst',)  # yours
    config.data.tokenizer_vocab_size = 32768
    config.data.seq_len = 2048

    config.optim.learning_rate = 1.5e-3
    config.optim.warmup_steps = 300
    config.train.steps = 6600
    config.train.batch_size = 256
    config.mesh.fsdp = 8
    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.max_rows = 256
    return config
