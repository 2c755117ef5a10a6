"""MixCon at 130M parameters: one block of 8 layers (2 attention, 6 Conba), 8 experts (top-2) on odd layers.

132M parameters, 86M active. 1.7B tokens, 20 per active parameter, are 9.2e+17 FLOPs: 0.6 hours of one H100
at 40 % MFU, which is an assumption and no measurement. Parameters, gradients and AdamW's moments take 2.1 GB in all.
As compiled for an H100 of 80 GB, its 128 rows in 4 microbatches take 29.6 GiB (``mixcon plan``); with 2 or
4 of them ``train.accum_steps`` may be 2 or 1. Learning rate and batch are of the usual size, not tuned. It wants your
own text: set ``data.sources``.

    mixcon train --config experiments/mixcon/130m.py --workdir runs/mixcon_130m
"""

from mixcon_jax.config import default
from mixcon_jax.models.presets import conba, hybrid


def get_config(arg=None):
    """Returns the configuration; the argument names a Conba preset (``conba``, ``conba_paper``, ``conba_code``)."""
    config = default()
    config.name = 'mixcon-130M'

    model = config.model
    model.vocab_size = 32768
    model.dim = 768
    model.num_blocks = 1
    model.pattern = hybrid(attention=2, conba=6, moe_every=2)
    model.tie_embeddings = True
    model.dtype = 'bfloat16'
    model.attention.num_heads = 12
    model.attention.num_kv_heads = 3
    model.mlp.hidden_dim = 2048
    model.moe.num_experts = 8
    model.moe.top_k = 2
    model.moe.hidden_dim = 832
    model.moe.router_z_coef = 1e-3
    model.conba.update(conba(arg or 'conba'))

    config.data.sources = ('files:/data/text/*.jsonl.zst',)  # yours
    config.data.tokenizer_vocab_size = 32768
    config.data.seq_len = 2048

    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 200
    config.train.steps = 6500
    config.train.batch_size = 128
    config.train.accum_steps = 4
    config.mesh.fsdp = 1
    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.max_rows = 128
    return config
