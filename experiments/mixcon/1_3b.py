"""MixCon at 1.3B parameters: two blocks of 8 layers (2 attention, 6 Conba), 8 experts (top-2) on odd layers.

1,293M parameters, 573M active. 11.4B tokens, 20 per active parameter, are 3.8e+19 FLOPs: 27 hours of one H100
at 40 % MFU, which is an assumption and no measurement. Parameters, gradients and AdamW's moments take 20.7 GB in all.
``mesh.fsdp`` is 8: it takes a multiple of 8 devices, each 8 rows in each of 4 microbatches; on n times as many,
``train.accum_steps`` may be 4 / n. Compiled for 8 H100s it takes 38.5 GiB of each (``mixcon plan``). Learning rate
and batch are of the usual size, not tuned. It wants your own text: set ``data.sources``.

    mixcon train --config experiments/mixcon/1_3b.py --workdir runs/mixcon_1_3b
"""

from mixcon_jax.config import default
from mixcon_jax.models.presets import conba, hybrid


def get_config(arg=None):
    """Returns the configuration; the argument names a Conba preset (``conba``, ``conba_paper``, ``conba_code``)."""
    config = default()
    config.name = 'mixcon-1.3B'

    model = config.model
    model.vocab_size = 32768
    model.dim = 1280
    model.num_blocks = 2
    model.pattern = hybrid(attention=2, conba=6, moe_every=2)
    model.tie_embeddings = False
    model.dtype = 'bfloat16'
    model.remat = 'selective'
    model.attention.num_heads = 20
    model.attention.num_kv_heads = 4
    model.mlp.hidden_dim = 3456
    model.moe.num_experts = 8
    model.moe.top_k = 2
    model.moe.hidden_dim = 3904
    model.moe.router_z_coef = 1e-3
    model.conba.update(conba(arg or 'conba'))

    config.data.sources = ('files:/data/text/*.jsonl.zst',)  # yours
    config.data.tokenizer_vocab_size = 32768
    config.data.seq_len = 4096

    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 500
    config.train.steps = 10900
    config.train.batch_size = 256
    config.train.accum_steps = 4
    config.mesh.fsdp = 8
    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.max_rows = 256
    return config
