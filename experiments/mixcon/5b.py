"""MixCon at 5B parameters: two blocks of 8 layers (2 attention, 6 Conba), 16 experts (top-2) on odd layers.

4,984M parameters, 1,417M active. 28.3B tokens, 20 per active parameter, are 2.2e+20 FLOPs: 158 hours of one H100
at 40 % MFU, which is an assumption and no measurement. Parameters, gradients and AdamW's moments take 79.7 GB in all.
``mesh.fsdp`` is 32: it takes a multiple of 32 devices, each 4 rows in each of 4 microbatches; on n times as many,
``train.accum_steps`` may be 4 / n. Compiled for 32 H100s it takes 36.3 GiB of each (``mixcon plan``). Learning rate
and batch are of the usual size, not tuned. It wants your own text: set ``data.sources``.

    mixcon train --config experiments/mixcon/5b.py --workdir runs/mixcon_5b
"""

from mixcon_jax.config import default
from mixcon_jax.models.presets import conba, hybrid


def get_config(arg=None):
    """Returns the configuration; the argument names a Conba preset (``conba``, ``conba_paper``, ``conba_code``)."""
    config = default()
    config.name = 'mixcon-5B'

    model = config.model
    model.vocab_size = 65536
    model.dim = 2048
    model.num_blocks = 2
    model.pattern = hybrid(attention=2, conba=6, moe_every=2)
    model.tie_embeddings = False
    model.dtype = 'bfloat16'
    model.remat = 'selective'
    model.attention.num_heads = 32
    model.attention.num_kv_heads = 4
    model.mlp.hidden_dim = 5632
    model.moe.num_experts = 16
    model.moe.top_k = 2
    model.moe.hidden_dim = 5184
    model.moe.router_z_coef = 1e-3
    model.conba.update(conba(arg or 'conba'))

    config.data.sources = ('files:/data/text/*.jsonl.zst',)  # yours
    config.data.tokenizer_vocab_size = 65536
    config.data.seq_len = 4096

    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 1000
    config.train.steps = 13500
    config.train.batch_size = 512
    config.train.accum_steps = 4
    config.mesh.fsdp = 32
    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.max_rows = 512
    return config
