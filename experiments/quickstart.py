"""A small but complete MixCon on the standard library's text: what `make quickstart` trains.

One block of 4 layers (3 Conba, 1 attention; experts on 2 of them). About 3 minutes on 2 CPU cores; it ends below gzip
-9's bits per byte on held-out text, and the README shows its loss curve.
"""

from mixcon_jax.config import default


def get_config(arg=None):
    """Returns the configuration; there is no argument."""
    del arg
    config = default()
    config.name = 'quickstart'

    model = config.model
    model.dim = 128
    model.pattern = ('conba+mlp', 'conba+moe', 'attention+mlp', 'conba+moe')
    model.vocab_size = 2048
    model.tie_embeddings = True
    model.attention.num_heads = 4
    model.attention.num_kv_heads = 2
    model.moe.num_experts = 4
    model.moe.top_k = 2

    config.data.sources = ('stdlib',)
    config.data.tokenizer_vocab_size = 2048
    config.data.seq_len = 256

    config.optim.learning_rate = 4e-3
    config.optim.warmup_steps = 30
    config.train.steps = 600
    config.train.batch_size = 4
    config.train.loss_chunk = 256
    config.eval.every = 200
    config.eval.max_rows = 64
    config.checkpoint.every = 200
    return config
