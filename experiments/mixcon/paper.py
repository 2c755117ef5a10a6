"""The paper's own model: 4 blocks of 8 layers, attention:Conba 2:6, 16 experts (top-2) on odd layers, 256K vocabulary.

52.88B parameters, 13.42B active, before Conba's own additions. The widths are those of the released configuration;
the paper prints none, and 2 KV heads are what its 2 GB cache at 256K tokens implies. Optimizer, data and schedule are
not reported: the ones below are placeholders of the usual size. It needs a cluster: parameters and AdamW's moments
alone take 0.6 TB, and the 1.05T tokens set here are 7.9e+22 FLOPs: 55,000 hours of one H100 at 40 % MFU, which is an
assumption and no measurement. ``mesh.fsdp`` is 128: it takes a multiple of 128 devices, each a row in each of 8
microbatches; on n times as many, ``train.accum_steps`` is to be 8 / n.
`mixcon config --config experiments/mixcon/paper.py` prints all of it.
"""

from mixcon_jax.config import default
from mixcon_jax.models.presets import conba, hybrid


def get_config(arg=None):
    """Returns the configuration; the argument names a Conba preset (``conba``, ``conba_paper``, ``conba_code``)."""
    config = default()
    config.name = 'mixcon-paper'

    model = config.model
    model.vocab_size = 262144
    model.dim = 4096
    model.num_blocks = 4
    model.pattern = hybrid(attention=2, conba=6, moe_every=2)
    model.dtype = 'bfloat16'
    model.remat = 'block'
    model.attention.num_heads = 32
    model.attention.num_kv_heads = 2
    model.mlp.hidden_dim = 14336
    model.moe.num_experts = 16
    model.moe.top_k = 2
    model.moe.hidden_dim = 14336
    model.moe.balance_coef = 2e-3  # 1e-3 in the released code, where the shares of the choices sum to top_k
    model.moe.router_z_coef = 1e-3
    model.conba.update(conba(arg or 'conba'))

    config.data.tokenizer_vocab_size = 262144
    config.data.seq_len = 4096
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 2000
    config.train.steps = 250000
    config.train.batch_size = 1024
    config.train.accum_steps = 8
    config.mesh.fsdp = 128
    config.checkpoint.every = 1000
    config.eval.every = 1000
    return config
